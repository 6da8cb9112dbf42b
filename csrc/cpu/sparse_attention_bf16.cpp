// Forward in bfloat16; other types go to the kernel of avx512.
#include "cpu/attention_tile.h"
#include "cpu/matrix.h"

namespace dk::avx512 {
extern const SparseAttentionKernel sparse_attention;
}

namespace dk::DK_ISA {

extern const SparseAttentionKernel sparse_attention;
const SparseAttentionKernel sparse_attention = avx512::sparse_attention;

}  // namespace dk::DK_ISA
