// The table of an instruction set with bfloat16 matrix products: avx512's table, except for attention.
#include "cpu/kernels.h"

namespace dk::avx512 {
const Kernels& table();
}

namespace dk::DK_ISA {

SparseAttentionKernel sparse_attention(const SparseAttentionArgs&);
SparseAttentionBackwardKernel sparse_attention_backward(const SparseAttentionBackwardArgs&);

const Kernels& table() {
  static const Kernels kernels = [] {
    Kernels t = avx512::table();
    t.sparse_attention = sparse_attention;
    t.sparse_attention_backward = sparse_attention_backward;
    return t;
  }();
  return kernels;
}

}   // namespace dk::DK_ISA
