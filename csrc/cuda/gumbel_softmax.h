#pragma once
#include "common/gumbel_softmax.h"

namespace dk::cuda {

const char* gumbel_softmax(const GumbelSoftmaxArgs& a, void* stream);   // returns nullptr or the error
const char* gumbel_softmax_backward(const GumbelSoftmaxBackwardArgs& a, void* stream);

}   // namespace dk::cuda
