#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace dk {

// Tensors of the logits' shape are viewed as [outer, classes, inner]. They are contiguous in this order or, if
// `classes_last` (CPU only), as [outer, inner, classes]. Statistics are contiguous float32 [outer, inner].
struct GumbelSoftmaxArgs {
  const void* logits;      // backward: null if neither hard nor with KL
  void* y;                 // backward: read unless hard
  float *kl, *max, *sum;   // null without KL. max and sum of exp(logits - max) are saved for the backward pass
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
