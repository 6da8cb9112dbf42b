// The interface of the backward kernels.
#pragma once
#include "cuda/sparse_attention.h"

namespace dk::cuda {

// Floats of scratch memory for the statistics of the queries and the partial results of split tiles.
int64_t sparse_attention_backward_scratch(const SparseAttentionBackwardArgs&, const PlanSizes& plan,
                                          const PlanSizes& backward_plan);
const char* sparse_attention_backward(const SparseAttentionBackwardArgs&, const PlanSizes& plan,
                                      const PlanSizes& backward_plan, float* scratch, void* stream);

}   // namespace dk::cuda
