#pragma once
#include <cstdint>

#include "cpu/dtype.h"

namespace dk {

constexpr int TILE_ROWS = 32, GROUP_COLUMNS = 8;   // the tile shape the CPU kernels read plans of

struct Strides {
  int64_t batch, head, token;   // in elements; the last dimension is contiguous
};

struct SparseAttentionArgs {
  const void *q, *k, *v;
  void* out;
  float* lse;   // [B, H, N] contiguous, natural log
  Strides q_strides, k_strides, v_strides, out_strides;
  int64_t heads, n, head_dim;
  const int32_t* plan;
  float scale;
  DType dtype;
};

struct SparseAttentionBackwardArgs {
  SparseAttentionArgs forward;   // out and lse are read
  const void* grad_out;
  void *grad_q, *grad_k, *grad_v;
  Strides grad_out_strides, grad_q_strides, grad_k_strides, grad_v_strides;
};

struct SparseAttentionKernel {
  int64_t (*workspace)(const SparseAttentionArgs&);   // floats
  void (*run)(const SparseAttentionArgs&, float* workspace, int64_t bh, int64_t tile_begin, int64_t tile_end);
};
struct SparseAttentionBackwardKernel {
  int64_t (*workspace)(const SparseAttentionBackwardArgs&);
  void (*run)(const SparseAttentionBackwardArgs&, float* workspace, int64_t bh);
};

}  // namespace dk
