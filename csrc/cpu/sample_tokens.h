#pragma once
#include "common/sample_tokens.h"

namespace dk {

struct SampleTokensKernel {
  int64_t (*workspace)(const SampleTokensArgs&);   // floats
  void (*run)(const SampleTokensArgs&, float* workspace, int64_t row);
};

}   // namespace dk
