#pragma once
#include "common/sample_tokens.h"

namespace dk::cuda {

const char* sample_tokens(const SampleTokensArgs& a, void* stream);   // returns nullptr or the error

}   // namespace dk::cuda
