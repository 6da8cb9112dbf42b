// The schema of every operation, once; libdalle_cpu.so and libdalle_cuda.so implement them.
#include "ops/common.h"

STABLE_TORCH_LIBRARY(dalle_kernels, m) {
  m.def("sparse_attention(Tensor q, Tensor k, Tensor v, Tensor plan, Tensor backward_plan, float scale) -> (Tensor, Tensor)");
  m.def("sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor backward_plan, float scale) -> (Tensor, Tensor, Tensor)");
}
