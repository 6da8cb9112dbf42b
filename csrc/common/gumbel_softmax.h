#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace dk {

// Tensors of logits' shape are seen as [outer, classes, inner] and lie so in memory, without gaps, or where
// `classes_last` (the CPU only) as [outer, inner, classes]; statistics are contiguous float32 [outer, inner].
struct GumbelSoftmaxArgs {
  const void* logits;      // backward: null if neither hard nor with KL
  void* y;                 // backward: read unless hard
  float *kl, *max, *sum;   // null without KL. max and sum of exp(logits - max) are kept for the backward pass
  int64_t outer, classes, inner;
  const int64_t* seed;
  const float* tau;
  bool hard, classes_last;
  DType dtype;
};

struct GumbelSoftmaxBackwardArgs {
  GumbelSoftmaxArgs forward;
  const void* grad_y;
  const float* grad_kl;   // null without KL
  void* grad_logits;
};

}   // namespace dk
