#pragma once
#include <cstdint>

#include "cpu/dtype.h"

namespace dk {

// Tensors of logits' shape are contiguous and seen as [outer, classes, inner]; statistics are contiguous float32 [outer, inner].
struct GumbelSoftmaxArgs {
  const void* logits;   // backward: null if neither hard nor with KL
  void* y;              // backward: read unless hard
  float *kl, *max, *sum;   // null without KL. max and sum of exp(logits - max) are kept for the backward pass
  int64_t outer, classes, inner;
  int64_t seed;
  float tau;
  bool hard;
  DType dtype;
};

struct GumbelSoftmaxBackwardArgs {
  GumbelSoftmaxArgs forward;
  const void* grad_y;
  const float* grad_kl;   // null without KL
  void* grad_logits;
};

// Work is cut into strips of neighbouring positions; a strip computes the same bits whichever thread runs it.
template <class Args> struct StripKernel {
  int64_t (*strips)(const Args&);
  int64_t (*workspace)(const Args&);   // floats
  void (*run)(const Args&, float* workspace, int64_t begin, int64_t end);
};
using GumbelSoftmaxKernel = StripKernel<GumbelSoftmaxArgs>;
using GumbelSoftmaxBackwardKernel = StripKernel<GumbelSoftmaxBackwardArgs>;

}  // namespace dk
