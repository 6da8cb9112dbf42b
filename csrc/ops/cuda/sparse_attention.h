// Shared by the launchers of sparse_attention, forward and backward.
#pragma once
#include "cuda/sparse_attention.h"
#include "ops/cuda/common.h"

namespace dk {

inline Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// `sizes` are those of the plan and of the backward plan; `plan` is number `which`. Its words are on the device and cannot be checked here.
inline PlanSizes plan_sizes(const Tensor& plan, const std::vector<int64_t>& sizes, int which) {
  STD_TORCH_CHECK(sizes.size() == 8, "expected four sizes of each of two plans");
  const int64_t* s = sizes.data() + 4 * which;
  STD_TORCH_CHECK(plan.numel() == s[0], "the plan has ", plan.numel(), " words, its sizes say ", s[0]);
  return {s[0], s[1], s[2], s[3]};
}

inline SparseAttentionArgs sparse_attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& plan,
                                                 double scale) {
  SparseAttentionArgs a;
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr(), a.out = out.data_ptr();
  a.lse = static_cast<float*>(lse.data_ptr());
  a.q_strides = strides_of(q), a.k_strides = strides_of(k), a.v_strides = strides_of(v), a.out_strides = strides_of(out);
  a.batch = q.size(0), a.heads = q.size(1), a.n = q.size(2), a.head_dim = q.size(3);
  a.plan = static_cast<const int32_t*>(plan.data_ptr());
  a.scale = static_cast<float>(scale);
  a.dtype = dtype_of(q);
  return a;
}

}  // namespace dk
