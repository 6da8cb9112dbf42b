#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace dk {

struct SequenceStrides {
  int64_t sequence, head;   // in elements; the last dimension is contiguous
};

struct DecodeAttentionArgs {
  const void *q, *k, *v;             // [P * C, H, D]
  const void *prefix_k, *prefix_v;   // [P, H, T, D] contiguous
  void *image_k, *image_v;           // [P * C, H, R, D], contiguous in R and D
  void* out;                         // [P * C, H, D] contiguous
  SequenceStrides q_strides, k_strides, v_strides, image_strides;
  int64_t prompts, candidates, heads, head_dim;
  const int64_t* step;
  const int64_t* text_lengths;   // [P]: how many text keys of each prompt exist; null: all
  const int32_t* schedule;
  float scale;
  DType dtype;
};

}   // namespace dk
