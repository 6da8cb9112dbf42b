// Backward in bfloat16; other types go to the kernel of avx512.
#include "cpu/attention_tile.h"
#include "cpu/matrix.h"

namespace dk::avx512 {
SparseAttentionBackwardKernel sparse_attention_backward(const SparseAttentionBackwardArgs&);
}

namespace dk::DK_ISA {

SparseAttentionBackwardKernel sparse_attention_backward(const SparseAttentionBackwardArgs& a) { return avx512::sparse_attention_backward(a); }

}  // namespace dk::DK_ISA
