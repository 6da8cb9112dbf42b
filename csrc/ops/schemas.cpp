// The schemas of all operations, defined once; libdalle_cpu.so and libdalle_cuda.so implement them. The tests' emulated
// library registers them under its own namespace.
#include "ops/common.h"

#if defined(DK_EMULATED)
STABLE_TORCH_LIBRARY(dalle_kernels_emulated, m) {
#else
STABLE_TORCH_LIBRARY(dalle_kernels, m) {
#endif
  m.def(
      "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor plan, Tensor backward_plan, int[] sizes, float scale, "
      "Tensor? text_lengths, Tensor? seed, float dropout_p, int head_offset) -> (Tensor, Tensor)");
  m.def(
      "sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor plan, "
      "Tensor backward_plan, int[] sizes, float scale, Tensor? text_lengths, Tensor? seed, float dropout_p, int "
      "head_offset) -> (Tensor, Tensor, Tensor)");
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor(a!) image_k, Tensor(b!) "
      "image_v, Tensor schedule, Tensor step, float scale, Tensor? text_lengths=None) -> Tensor");
  m.def(
      "gumbel_softmax(Tensor logits, Tensor seed, Tensor tau, bool hard, int dim, bool return_kl) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "gumbel_softmax_backward(Tensor grad_y, Tensor? grad_kl, Tensor? y, Tensor? logits, Tensor? kl, Tensor? stats, "
      "Tensor seed, Tensor tau, bool hard, int dim) -> Tensor");
  m.def(
      "sample_tokens(Tensor logits, Tensor seed, Tensor offset, float temperature, int top_k, float top_p) -> Tensor");
}
