// What the launchers of sparse_attention call.
#pragma once
#include "common/sparse_attention.h"

namespace dk {

// What a host must know of a plan (dalle_kernels/plan.py: plan_tensor) whose words are on the device.
struct PlanSizes {
  int64_t words, items, partials, split_tiles;
};

namespace cuda {

// Floats of scratch memory for the partial results of split tiles.
int64_t sparse_attention_scratch(const SparseAttentionArgs&, const PlanSizes&);
const char* sparse_attention(const SparseAttentionArgs&, const PlanSizes&, float* scratch, void* stream);

}   // namespace cuda

}   // namespace dk
