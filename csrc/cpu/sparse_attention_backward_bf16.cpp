// Backward in bfloat16; other types go to the kernel of avx512.
#include "cpu/attention_tile.h"
#include "cpu/matrix.h"

namespace dk::avx512 {
extern const SparseAttentionBackwardKernel sparse_attention_backward;
}

namespace dk::DK_ISA {

extern const SparseAttentionBackwardKernel sparse_attention_backward;
const SparseAttentionBackwardKernel sparse_attention_backward = avx512::sparse_attention_backward;

}  // namespace dk::DK_ISA
