#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace dk {

struct SampleTokensArgs {
  const void* logits;                            // [rows, vocabulary], rows `row_stride` elements apart
  const int64_t *seed, *offset;                  // [rows]
  int64_t* tokens;                               // [rows]
  int64_t rows, vocabulary, row_stride, top_k;   // top_k 0: all
  float temperature;
  double top_p;   // 1: all
  DType dtype;
};

}   // namespace dk
