// sample_tokens: one block per row. Arguments were checked in Python.
#include "cuda/sample_tokens.h"

#include <cstdint>

#include "ops/cuda/common.h"

namespace dk {

static Tensor sample_tokens(Tensor logits, Tensor seed, Tensor offset, double temperature, int64_t top_k, double top_p) {
  const OnDevice guard(logits);
  STD_TORCH_CHECK(logits.size(1) <= INT32_MAX, "a row may hold 2^31 - 1 logits; got ", logits.size(1));
  if (logits.stride(1) != 1) logits = as_contiguous(logits);
  seed = as_contiguous(seed), offset = as_contiguous(offset);
  Tensor tokens = new_output(logits, {logits.size(0)}, ScalarType::Long);
  SampleTokensArgs a;
  a.logits = logits.data_ptr();
  a.seed = static_cast<const int64_t*>(seed.data_ptr()), a.offset = static_cast<const int64_t*>(offset.data_ptr());
  a.tokens = static_cast<int64_t*>(tokens.data_ptr());
  a.rows = logits.size(0), a.vocabulary = logits.size(1), a.row_stride = logits.stride(0);
  a.top_k = top_k, a.top_p = top_p;
  a.temperature = static_cast<float>(temperature);
  a.dtype = dtype_of(logits);
  check_launch(cuda::sample_tokens(a, current_stream(logits)));
  return tokens;
}

}  // namespace dk

DK_REGISTER(m) { m.impl("sample_tokens", TORCH_BOX(&dk::sample_tokens)); }
