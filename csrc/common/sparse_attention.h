#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace dk {

struct Strides {
  int64_t batch, head, token;   // in elements; the last dimension is contiguous
};

struct SparseAttentionArgs {
  const void *q, *k, *v;
  void* out;
  float* lse;   // [B, H, N] contiguous, natural log
  Strides q_strides, k_strides, v_strides, out_strides;
  int64_t batch, heads, n, head_dim;
  const int32_t* plan;
  float scale;
  DType dtype;
};

struct SparseAttentionBackwardArgs {
  SparseAttentionArgs forward;    // out and lse are read
  const int32_t* backward_plan;   // not used on the CPU
  const void* grad_out;
  void *grad_q, *grad_k, *grad_v;
  Strides grad_out_strides, grad_q_strides, grad_k_strides, grad_v_strides;
};

}   // namespace dk
