// The interface of the forward kernels.
#pragma once
#include "common/sparse_attention.h"

namespace dk {

// The sizes that the host needs of a plan on the device (PlanSizes in dalle_kernels/backends/plans.py).
struct PlanSizes {
  int64_t words, items, partials, split_tiles;
};

namespace cuda {

// Floats of scratch memory for the partial results of split tiles.
int64_t sparse_attention_scratch(const SparseAttentionArgs&, const PlanSizes&);
const char* sparse_attention(const SparseAttentionArgs&, const PlanSizes&, float* scratch, void* stream);

}   // namespace cuda

}   // namespace dk
