#pragma once
#include "common/gumbel_softmax.h"

namespace dk {

// Work is split into strips of adjacent positions. The result of a strip does not depend on the thread that runs it.
template <class Args> struct StripKernel {
  int64_t (*strips)(const Args&);
  int64_t (*workspace)(const Args&);   // floats
  void (*run)(const Args&, float* workspace, int64_t begin, int64_t end);
};
using GumbelSoftmaxKernel = StripKernel<GumbelSoftmaxArgs>;
using GumbelSoftmaxBackwardKernel = StripKernel<GumbelSoftmaxBackwardArgs>;

}   // namespace dk
