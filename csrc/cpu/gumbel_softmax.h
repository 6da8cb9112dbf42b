#pragma once
#include "common/gumbel_softmax.h"

namespace dk {

// Work is cut into strips of neighbouring positions; a strip computes the same bits whichever thread runs it.
template <class Args> struct StripKernel {
  int64_t (*strips)(const Args&);
  int64_t (*workspace)(const Args&);   // floats
  void (*run)(const Args&, float* workspace, int64_t begin, int64_t end);
};
using GumbelSoftmaxKernel = StripKernel<GumbelSoftmaxArgs>;
using GumbelSoftmaxBackwardKernel = StripKernel<GumbelSoftmaxBackwardArgs>;

}   // namespace dk
