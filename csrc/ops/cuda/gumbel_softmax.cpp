// gumbel_softmax, forward and backward: views the logits as [outer, classes, inner]. Arguments are checked in Python.
#include "cuda/gumbel_softmax.h"

#include <cstdint>
#include <optional>

#include "ops/arguments.h"
#include "ops/cuda/common.h"

namespace dk {

static void check_classes(int64_t classes) {
  STD_TORCH_CHECK(classes <= INT32_MAX, "there may be 2^31 - 1 classes; got ", classes);
}

// stats [2, ...]: maximum of the logits over dim, and sum of exp(logits - maximum). stats and kl are empty without
// return_kl.
static std::tuple<Tensor, Tensor, Tensor> gumbel_softmax(Tensor logits, Tensor seed, Tensor tau, bool hard, int64_t dim,
                                                         bool return_kl) {
  const OnDevice guard(logits);
  logits = as_contiguous(logits);
  check_classes(logits.size(dim));
  GumbelSoftmaxArgs a = gumbel_softmax_args(logits, seed, tau, hard, dim);
  std::vector<int64_t> shape{0}, stats_shape{0};
  if (return_kl) {
    shape.clear();
    for (int64_t i = 0; i < logits.dim(); ++i)
      if (i != dim) shape.push_back(logits.size(i));
    stats_shape = shape;
    stats_shape.insert(stats_shape.begin(), 2);
  }
  Tensor y = new_output_like(logits), kl = new_output(logits, shape, ScalarType::Float),
         stats = new_output(logits, stats_shape, ScalarType::Float);
  a.logits = logits.data_ptr(), a.y = y.data_ptr();
  if (return_kl) set_stats(a, kl, stats);
  if (logits.numel() > 0) check_launch(cuda::gumbel_softmax(a, current_stream(logits)));
  return {y, kl, stats};
}

// y is required unless hard; logits if hard or with grad_kl, which also requires kl and stats
static Tensor gumbel_softmax_backward(Tensor grad_y, std::optional<Tensor> grad_kl, std::optional<Tensor> y,
                                      std::optional<Tensor> logits, std::optional<Tensor> kl,
                                      std::optional<Tensor> stats, Tensor seed, Tensor tau, bool hard, int64_t dim) {
  const OnDevice guard(grad_y);
  const auto read = [](std::optional<Tensor>& t) -> void* {
    if (!t) return nullptr;
    t = as_contiguous(*t);
    return t->data_ptr();
  };
  grad_y = as_contiguous(grad_y);
  check_classes(grad_y.size(dim));
  Tensor grad_logits = new_output_like(grad_y);
  GumbelSoftmaxBackwardArgs a{};
  a.forward = gumbel_softmax_args(grad_y, seed, tau, hard, dim);
  a.forward.logits = read(logits), a.forward.y = read(y);
  if (grad_kl) set_stats(a.forward, *kl, *stats);
  a.grad_y = grad_y.data_ptr(), a.grad_kl = static_cast<const float*>(read(grad_kl));
  a.grad_logits = grad_logits.data_ptr();
  if (grad_y.numel() > 0) check_launch(cuda::gumbel_softmax_backward(a, current_stream(grad_y)));
  return grad_logits;
}

}   // namespace dk

DK_REGISTER(m) {
  m.impl("gumbel_softmax", TORCH_BOX(&dk::gumbel_softmax));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&dk::gumbel_softmax_backward));
}
