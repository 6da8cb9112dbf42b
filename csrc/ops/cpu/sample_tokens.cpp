// sample_tokens: one work item per row. Arguments were checked in Python.
#include "ops/cpu/common.h"

namespace dk {

static Tensor sample_tokens(Tensor logits, Tensor seed, Tensor offset, double temperature, int64_t top_k, double top_p) {
  if (logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
  seed = torch::stable::contiguous(seed), offset = torch::stable::contiguous(offset);
  Tensor tokens = torch::stable::new_empty(logits, {logits.size(0)}, torch::headeronly::ScalarType::Long);
  SampleTokensArgs a;
  a.logits = logits.data_ptr();
  a.seed = static_cast<const int64_t*>(seed.data_ptr()), a.offset = static_cast<const int64_t*>(offset.data_ptr());
  a.tokens = static_cast<int64_t*>(tokens.data_ptr());
  a.rows = logits.size(0), a.vocabulary = logits.size(1), a.row_stride = logits.stride(0);
  a.top_k = top_k, a.top_p = top_p;
  a.temperature = static_cast<float>(temperature);
  a.dtype = dtype_of(logits);
  const SampleTokensKernel& kernel = kernels().sample_tokens;
  for_each_item(logits.size(0), kernel.workspace(a), [&](int64_t row, float* workspace) { kernel.run(a, workspace, row); });
  return tokens;
}

}  // namespace dk

STABLE_TORCH_LIBRARY_IMPL(dalle_kernels, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&dk::sample_tokens)); }
