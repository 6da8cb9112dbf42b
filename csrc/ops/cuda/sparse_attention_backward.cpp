// sparse_attention, backward: allocates, and launches the kernels. Arguments are checked in Python.
#include <optional>

#include "cuda/sparse_attention_backward.h"
#include "ops/cuda/sparse_attention.h"

namespace dk {

static std::tuple<Tensor, Tensor, Tensor> sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                                    Tensor out, Tensor lse, Tensor plan,
                                                                    Tensor backward_plan, std::vector<int64_t> sizes,
                                                                    double scale, std::optional<Tensor>,
                                                                    std::optional<Tensor>, double, int64_t) {
  const OnDevice guard(q);
  Tensor grad_q = new_output_like(q), grad_k = new_output_like(k), grad_v = new_output_like(v);
  SparseAttentionBackwardArgs a;
  a.forward = sparse_attention_args(q, k, v, out, lse, plan, scale);
  a.backward_plan = static_cast<const int32_t*>(backward_plan.data_ptr());
  a.grad_out = grad_out.data_ptr(), a.grad_q = grad_q.data_ptr(), a.grad_k = grad_k.data_ptr(),
  a.grad_v = grad_v.data_ptr();
  a.grad_out_strides = strides_of(grad_out), a.grad_q_strides = strides_of(grad_q);
  a.grad_k_strides = strides_of(grad_k), a.grad_v_strides = strides_of(grad_v);
  const PlanSizes by_queries = plan_sizes(plan, sizes, 0), by_keys = plan_sizes(backward_plan, sizes, 1);
  Tensor scratch = new_output(q, {cuda::sparse_attention_backward_scratch(a, by_queries, by_keys)}, ScalarType::Float);
  check_launch(cuda::sparse_attention_backward(a, by_queries, by_keys, static_cast<float*>(scratch.data_ptr()),
                                               current_stream(q)));
  return {grad_q, grad_k, grad_v};
}

}   // namespace dk

DK_REGISTER(m) { m.impl("sparse_attention_backward", TORCH_BOX(&dk::sparse_attention_backward)); }
