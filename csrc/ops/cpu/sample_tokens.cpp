// sample_tokens: one work item per row. Arguments are checked in Python.
#include "ops/arguments.h"
#include "ops/cpu/common.h"

namespace dk {

static Tensor sample_tokens(Tensor logits, Tensor seed, Tensor offset, double temperature, int64_t top_k,
                            double top_p) {
  if (logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
  seed = torch::stable::contiguous(seed), offset = torch::stable::contiguous(offset);
  Tensor tokens = torch::stable::new_empty(logits, {logits.size(0)}, torch::headeronly::ScalarType::Long);
  const SampleTokensArgs a = sample_tokens_args(logits, seed, offset, tokens, temperature, top_k, top_p);
  const SampleTokensKernel& kernel = kernels().sample_tokens;
  for_each_item(logits.size(0), kernel.workspace(a),
                [&](int64_t row, float* workspace) { kernel.run(a, workspace, row); });
  return tokens;
}

}   // namespace dk

STABLE_TORCH_LIBRARY_IMPL(dalle_kernels, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&dk::sample_tokens)); }
