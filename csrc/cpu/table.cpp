// The table of one instruction set.
#include "cpu/kernels.h"

namespace dk::DK_ISA {

extern const SparseAttentionKernel sparse_attention;
extern const SparseAttentionBackwardKernel sparse_attention_backward;

const Kernels& table() {
  static const Kernels kernels = {sparse_attention, sparse_attention_backward};
  return kernels;
}

}  // namespace dk::DK_ISA
