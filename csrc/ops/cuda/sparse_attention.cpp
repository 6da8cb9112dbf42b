// sparse_attention, forward: allocates, and launches the kernel. Arguments are checked in Python.
#include <optional>

#include "ops/cuda/sparse_attention.h"

namespace dk {

// The options are refused in Python.
static std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v, Tensor plan, Tensor,
                                                   std::vector<int64_t> sizes, double scale, std::optional<Tensor>,
                                                   std::optional<Tensor>, double, int64_t) {
  const OnDevice guard(q);
  Tensor out = new_output_like(q), lse = new_output(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  const SparseAttentionArgs a = sparse_attention_args(q, k, v, out, lse, plan, scale);
  const PlanSizes s = plan_sizes(plan, sizes, 0);
  Tensor scratch = new_output(q, {cuda::sparse_attention_scratch(a, s)}, ScalarType::Float);
  check_launch(cuda::sparse_attention(a, s, static_cast<float*>(scratch.data_ptr()), current_stream(q)));
  return {out, lse};
}

}   // namespace dk

DK_REGISTER(m) { m.impl("sparse_attention", TORCH_BOX(&dk::sparse_attention)); }
