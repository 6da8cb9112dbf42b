// Conversion of tensors to kernel arguments, for every device. Tensors have been checked before.
#pragma once
#include "common/decode_attention.h"
#include "common/gumbel_softmax.h"
#include "common/sample_tokens.h"
#include "common/sparse_attention.h"
#include "ops/common.h"

namespace dk {

inline Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// The matrix of queries' rows `t`, addressed by token: the row of token `first` is its first.
inline char* from_token(const Tensor& t, int64_t first) {
  return static_cast<char*>(t.data_ptr()) - first * t.stride(2) * static_cast<int64_t>(t.element_size());
}

inline SparseAttentionArgs sparse_attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                                 const Tensor& lse, const Tensor& plan, double scale) {
  SparseAttentionArgs a{};
  a.batch = q.size(0), a.heads = q.size(1), a.n = k.size(2), a.head_dim = q.size(3);
  a.group = a.heads / k.size(1), a.queries = q.size(2);
  const int64_t first = a.n - a.queries;
  a.q = from_token(q, first), a.k = k.data_ptr(), a.v = v.data_ptr(), a.out = from_token(out, first);
  a.lse = static_cast<float*>(lse.data_ptr()) - first;
  a.q_strides = strides_of(q), a.k_strides = strides_of(k), a.v_strides = strides_of(v),
  a.out_strides = strides_of(out);
  a.plan = static_cast<const int32_t*>(plan.data_ptr());
  a.scale = static_cast<float>(scale);
  a.dtype = dtype_of(q);
  return a;
}

inline SequenceStrides sequence_strides_of(const Tensor& t) { return {t.stride(0), t.stride(1)}; }

inline DecodeAttentionArgs decode_attention_args(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& prefix_k, const Tensor& prefix_v, const Tensor& image_k,
                                                 const Tensor& image_v, const Tensor& out, const Tensor& schedule,
                                                 const Tensor& step, double scale) {
  STD_TORCH_CHECK(image_k.stride(0) == image_v.stride(0) && image_k.stride(1) == image_v.stride(1),
                  "keys and values must be stored alike");
  DecodeAttentionArgs a{};
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr(), a.out = out.data_ptr();
  a.prefix_k = prefix_k.data_ptr(), a.prefix_v = prefix_v.data_ptr(), a.image_k = image_k.data_ptr(),
  a.image_v = image_v.data_ptr();
  a.q_strides = sequence_strides_of(q), a.k_strides = sequence_strides_of(k), a.v_strides = sequence_strides_of(v);
  a.image_strides = sequence_strides_of(image_k);
  a.prompts = prefix_k.size(0), a.candidates = q.size(0) / a.prompts, a.heads = q.size(1), a.head_dim = q.size(2);
  a.schedule = static_cast<const int32_t*>(schedule.data_ptr());
  a.step = static_cast<const int64_t*>(step.data_ptr());
  a.scale = static_cast<float>(scale);
  a.dtype = dtype_of(q);
  return a;
}

inline GumbelSoftmaxArgs gumbel_softmax_args(const Tensor& like, const Tensor& seed, const Tensor& tau, bool hard,
                                             int64_t dim) {
  GumbelSoftmaxArgs a{};
  a.outer = a.inner = 1;
  for (int64_t i = 0; i < dim; ++i) a.outer *= like.size(i);
  for (int64_t i = dim + 1; i < like.dim(); ++i) a.inner *= like.size(i);
  a.classes = like.size(dim);
  a.seed = static_cast<const int64_t*>(seed.data_ptr());
  a.tau = static_cast<const float*>(tau.data_ptr());
  a.hard = hard;
  a.dtype = dtype_of(like);
  return a;
}

inline void set_stats(GumbelSoftmaxArgs& a, const Tensor& kl, const Tensor& stats) {
  a.kl = static_cast<float*>(kl.data_ptr());
  a.max = static_cast<float*>(stats.data_ptr());
  a.sum = a.max + a.outer * a.inner;
}

inline SampleTokensArgs sample_tokens_args(const Tensor& logits, const Tensor& seed, const Tensor& offset,
                                           const Tensor& tokens, double temperature, int64_t top_k, double top_p) {
  SampleTokensArgs a;
  a.logits = logits.data_ptr();
  a.seed = static_cast<const int64_t*>(seed.data_ptr()), a.offset = static_cast<const int64_t*>(offset.data_ptr());
  a.tokens = static_cast<int64_t*>(tokens.data_ptr());
  a.rows = logits.size(0), a.vocabulary = logits.size(1), a.row_stride = logits.stride(0);
  a.top_k = top_k, a.top_p = top_p;
  a.temperature = static_cast<float>(temperature);
  a.dtype = dtype_of(logits);
  return a;
}

}   // namespace dk
