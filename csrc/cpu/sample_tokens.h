#pragma once
#include <cstdint>

#include "cpu/dtype.h"

namespace dk {

struct SampleTokensArgs {
  const void* logits;             // [rows, vocabulary], rows `row_stride` elements apart
  const int64_t *seed, *offset;   // [rows]
  int64_t* tokens;                // [rows]
  int64_t vocabulary, row_stride, top_k;   // top_k 0: all
  float temperature;
  double top_p;                   // 1: all
  DType dtype;
};

struct SampleTokensKernel {
  int64_t (*workspace)(const SampleTokensArgs&);   // floats
  void (*run)(const SampleTokensArgs&, float* workspace, int64_t row);
};

}  // namespace dk
