// Shared by the launchers of sparse_attention, forward and backward.
#pragma once
#include "cuda/sparse_attention.h"
#include "ops/arguments.h"
#include "ops/cuda/common.h"

namespace dk {

// The sizes of plan number `which` among `sizes`, those of the plan and of the backward plan. The plan itself is on the
// device and cannot be checked here.
inline PlanSizes plan_sizes(const Tensor& plan, const std::vector<int64_t>& sizes, int which) {
  STD_TORCH_CHECK(sizes.size() == 12, "expected six sizes of each of two plans");
  const int64_t* s = sizes.data() + 6 * which;   // length, rows, columns, items, partials, split tiles
  STD_TORCH_CHECK(plan.numel() == s[0], "the plan has ", plan.numel(), " words, its sizes say ", s[0]);
  return {s[0], s[3], s[4], s[5]};
}

}   // namespace dk
