// sample_tokens: one block per row. Arguments are checked in Python.
#include "cuda/sample_tokens.h"

#include <cstdint>

#include "ops/arguments.h"
#include "ops/cuda/common.h"

namespace dk {

static Tensor sample_tokens(Tensor logits, Tensor seed, Tensor offset, double temperature, int64_t top_k,
                            double top_p) {
  const OnDevice guard(logits);
  STD_TORCH_CHECK(logits.size(1) <= INT32_MAX, "a row may hold 2^31 - 1 logits; got ", logits.size(1));
  if (logits.stride(1) != 1) logits = as_contiguous(logits);
  seed = as_contiguous(seed), offset = as_contiguous(offset);
  Tensor tokens = new_output(logits, {logits.size(0)}, ScalarType::Long);
  check_launch(cuda::sample_tokens(sample_tokens_args(logits, seed, offset, tokens, temperature, top_k, top_p),
                                   current_stream(logits)));
  return tokens;
}

}   // namespace dk

DK_REGISTER(m) { m.impl("sample_tokens", TORCH_BOX(&dk::sample_tokens)); }
