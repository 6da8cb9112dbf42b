// sparse_attention, forward and backward: checks the plan, allocates, spreads (batch, head, tiles) over threads. Arguments were checked in Python.
#include <vector>

#include "common/plan.h"
#include "ops/arguments.h"
#include "ops/cpu/common.h"

namespace dk {

static void check_plan(const Tensor& plan, int64_t n) {
  const int32_t* p = static_cast<const int32_t*>(plan.data_ptr());
  STD_TORCH_CHECK(plan.numel() >= Plan::HEADER && p[Plan::MAGIC] == Plan::MAGIC_VALUE && p[Plan::VERSION] == Plan::VERSION_VALUE && p[Plan::TOTAL] == plan.numel(),
                  "not a plan of this version");
  STD_TORCH_CHECK(p[Plan::N] == n && p[Plan::TILE_ROWS] == TILE_ROWS && p[Plan::GROUP_COLUMNS] == GROUP_COLUMNS,
                  "the plan was compiled for another length or tile shape");
}

static std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v, Tensor plan, Tensor, std::vector<int64_t>, double scale) {
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, torch::headeronly::ScalarType::Float);
  check_plan(plan, q.size(2));
  const SparseAttentionArgs a = sparse_attention_args(q, k, v, out, lse, plan, scale);
  const int64_t pairs = q.size(0) * a.heads, tiles = Plan(a.plan).tiles();
  if (pairs == 0) return {out, lse};
  // Enough pieces per head that the last thread does not work alone; a piece computes the same bits whatever the cut.
  const int64_t pieces = std::clamp<int64_t>((4 * torch::stable::get_num_threads() + pairs - 1) / pairs, 1, tiles);
  const SparseAttentionKernel& kernel = kernels().sparse_attention;
  for_each_item(pairs * pieces, kernel.workspace(a), [&](int64_t item, float* workspace) {
    const int64_t bh = item / pieces, piece = item % pieces;
    kernel.run(a, workspace, bh, tiles * piece / pieces, tiles * (piece + 1) / pieces);
  });
  return {out, lse};
}

static std::tuple<Tensor, Tensor, Tensor> sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor plan, Tensor,
                                                                    std::vector<int64_t>, double scale) {
  Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k), grad_v = torch::stable::empty_like(v);
  SparseAttentionBackwardArgs a;
  check_plan(plan, q.size(2));
  a.forward = sparse_attention_args(q, k, v, out, lse, plan, scale);
  a.grad_out = grad_out.data_ptr(), a.grad_q = grad_q.data_ptr(), a.grad_k = grad_k.data_ptr(), a.grad_v = grad_v.data_ptr();
  a.grad_out_strides = strides_of(grad_out), a.grad_q_strides = strides_of(grad_q);
  a.grad_k_strides = strides_of(grad_k), a.grad_v_strides = strides_of(grad_v);
  const SparseAttentionBackwardKernel& kernel = kernels().sparse_attention_backward;
  for_each_item(q.size(0) * q.size(1), kernel.workspace(a), [&](int64_t bh, float* workspace) { kernel.run(a, workspace, bh); });
  return {grad_q, grad_k, grad_v};
}

}  // namespace dk

STABLE_TORCH_LIBRARY_IMPL(dalle_kernels, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&dk::sparse_attention));
  m.impl("sparse_attention_backward", TORCH_BOX(&dk::sparse_attention_backward));
}
