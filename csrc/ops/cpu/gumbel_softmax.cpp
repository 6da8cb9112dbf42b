// gumbel_softmax, forward and backward: views the logits as [outer, classes, inner], allocates, and distributes strips
// over threads. Arguments are checked in Python.
#include <optional>
#include <utility>
#include <vector>

#include "ops/arguments.h"
#include "ops/cpu/common.h"

namespace dk {

template <class Args> static void run_strips(const StripKernel<Args>& kernel, const Args& a, int64_t elements) {
  if (elements == 0) return;
  const int64_t strips = kernel.strips(a);
  const int64_t piece =
      std::max<int64_t>(1, 16384 * strips / elements);   // batches short strips into tasks of about 16K elements
  for_each_item((strips + piece - 1) / piece, kernel.workspace(a), [&](int64_t item, float* workspace) {
    kernel.run(a, workspace, item * piece, std::min(strips, (item + 1) * piece));
  });
}

// Whether `t` has the memory layout of a contiguous tensor with `dim` last, such as channels_last images with dim 1.
static bool is_last_in_memory(const Tensor& t, int64_t dim) {
  int64_t stride = 1;
  const auto follows = [&](int64_t i) {
    return t.size(i) == 1 || t.stride(i) == std::exchange(stride, stride * t.size(i));
  };
  bool last = follows(dim);
  for (int64_t i = t.dim() - 1; i >= 0; --i) last = last && (i == dim || follows(i));
  return last;
}

// Classes that are last in memory stay last; tensors of all other layouts become contiguous.
static bool keeps_classes_last(const Tensor& t, int64_t dim) { return !t.is_contiguous() && is_last_in_memory(t, dim); }

// stats [2, ...]: maximum of the logits over dim, and sum of exp(logits - maximum). stats and kl are empty without
// return_kl.
static std::tuple<Tensor, Tensor, Tensor> gumbel_softmax(Tensor logits, Tensor seed, Tensor tau, bool hard, int64_t dim,
                                                         bool return_kl) {
  const bool classes_last = keeps_classes_last(logits, dim);
  if (!classes_last) logits = torch::stable::contiguous(logits);
  GumbelSoftmaxArgs a = gumbel_softmax_args(logits, seed, tau, hard, dim);
  a.classes_last = classes_last;
  std::vector<int64_t> shape{0}, stats_shape{0};
  if (return_kl) {
    shape.clear();
    for (int64_t i = 0; i < logits.dim(); ++i)
      if (i != dim) shape.push_back(logits.size(i));
    stats_shape = shape;
    stats_shape.insert(stats_shape.begin(), 2);
  }
  Tensor y = fresh(torch::stable::empty_like(logits));
  Tensor kl = torch::stable::new_empty(logits, shape, torch::headeronly::ScalarType::Float);
  Tensor stats = torch::stable::new_empty(logits, stats_shape, torch::headeronly::ScalarType::Float);
  a.logits = logits.data_ptr(), a.y = y.data_ptr();
  if (return_kl) set_stats(a, kl, stats);
  run_strips(kernels().gumbel_softmax, a, logits.numel());
  return {y, kl, stats};
}

// y is required unless hard; logits if hard or with grad_kl, which also requires kl and stats
static Tensor gumbel_softmax_backward(Tensor grad_y, std::optional<Tensor> grad_kl, std::optional<Tensor> y,
                                      std::optional<Tensor> logits, std::optional<Tensor> kl,
                                      std::optional<Tensor> stats, Tensor seed, Tensor tau, bool hard, int64_t dim) {
  const Tensor like = y ? *y : *logits;
  const bool classes_last = keeps_classes_last(like, dim);
  const auto laid_out = [&](const Tensor& t) {
    if (!classes_last) return torch::stable::contiguous(t);
    if (is_last_in_memory(t, dim)) return t;
    Tensor copy = torch::stable::empty_like(like);
    return torch::stable::copy_(copy, t);
  };
  grad_y = laid_out(grad_y);
  if (y) y = laid_out(*y);
  if (logits) logits = laid_out(*logits);
  if (grad_kl) grad_kl = torch::stable::contiguous(*grad_kl);
  Tensor grad_logits = fresh(torch::stable::empty_like(grad_y));
  GumbelSoftmaxBackwardArgs a{};
  a.forward = gumbel_softmax_args(grad_y, seed, tau, hard, dim);
  a.forward.classes_last = classes_last;
  a.forward.logits = logits ? logits->data_ptr() : nullptr, a.forward.y = y ? y->data_ptr() : nullptr;
  if (grad_kl) set_stats(a.forward, *kl, *stats);
  a.grad_y = grad_y.data_ptr(), a.grad_kl = grad_kl ? static_cast<const float*>(grad_kl->data_ptr()) : nullptr;
  a.grad_logits = grad_logits.data_ptr();
  run_strips(kernels().gumbel_softmax_backward, a, grad_y.numel());
  return grad_logits;
}

}   // namespace dk

STABLE_TORCH_LIBRARY_IMPL(dalle_kernels, CPU, m) {
  m.impl("gumbel_softmax", TORCH_BOX(&dk::gumbel_softmax));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&dk::gumbel_softmax_backward));
}
