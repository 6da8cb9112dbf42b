// The table of one instruction set.
#include "cpu/kernels.h"

namespace dk::DK_ISA {

SparseAttentionKernel sparse_attention(const SparseAttentionArgs&);
SparseAttentionBackwardKernel sparse_attention_backward(const SparseAttentionBackwardArgs&);
extern const DecodeAttentionKernel decode_attention;
extern const GumbelSoftmaxKernel gumbel_softmax;
extern const GumbelSoftmaxBackwardKernel gumbel_softmax_backward;
extern const SampleTokensKernel sample_tokens;

const Kernels& table() {
  static const Kernels kernels = {sparse_attention, sparse_attention_backward, decode_attention,
                                  gumbel_softmax,   gumbel_softmax_backward,   sample_tokens};
  return kernels;
}

}   // namespace dk::DK_ISA
