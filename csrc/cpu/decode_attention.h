#pragma once
#include <cstdint>

#include "cpu/dtype.h"

namespace dk {

struct SequenceStrides {
  int64_t sequence, head;   // in elements; the last dimension is contiguous
};

struct DecodeAttentionArgs {
  const void *q, *k, *v;                 // [P * C, H, D]
  const void *prefix_k, *prefix_v;       // [P, H, T, D] contiguous
  void *image_k, *image_v;               // [P * C, H, R, D], contiguous in R and D
  void* out;                             // [P * C, H, D] contiguous
  SequenceStrides q_strides, k_strides, v_strides, image_strides;
  int64_t candidates, heads, head_dim, step;
  const int32_t* schedule;
  float scale;
  DType dtype;
};

constexpr int MOST_CANDIDATES = 32;   // that one call of `run` takes

struct DecodeAttentionKernel {
  int64_t (*workspace)(const DecodeAttentionArgs&);   // floats
  // One head of candidates [begin, end) of a prompt. How candidates are cut into calls changes no bit of their results.
  void (*run)(const DecodeAttentionArgs&, float* workspace, int64_t prompt, int64_t head, int64_t begin, int64_t end);
};

}  // namespace dk
