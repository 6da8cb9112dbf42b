// Forward in bfloat16; other types go to the kernel of avx512.
#include "cpu/attention_tile.h"
#include "cpu/matrix.h"

namespace dk::avx512 {
SparseAttentionKernel sparse_attention(const SparseAttentionArgs&);
}

namespace dk::DK_ISA {

SparseAttentionKernel sparse_attention(const SparseAttentionArgs& a) { return avx512::sparse_attention(a); }

}  // namespace dk::DK_ISA
