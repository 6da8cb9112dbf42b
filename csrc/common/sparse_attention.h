#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace dk {

struct Strides {
  int64_t batch, head, token;   // in elements; the last dimension is contiguous
};

// The tokens are [0, n); the queries are the last of them. Matrices with a row per query (Q, O, lse and their
// gradients) are addressed by token, so their pointers are those of token 0, whose row exists only if every token is a
// query.
struct SparseAttentionArgs {
  const void *q, *k, *v;
  void* out;
  float* lse;   // [B, H, queries] contiguous, natural log
  Strides q_strides, k_strides, v_strides, out_strides;
  int64_t batch, heads, n, head_dim;
  int64_t group;     // heads per head of K and V
  int64_t queries;   // number of queries
  const int32_t* plan;
  float scale;
  DType dtype;
  // [B]: how many text keys of each sequence exist; nullptr: all
  const int64_t* text_lengths;
  // Dropout: a pair is dropped if the random bits of (seed[b], head_offset + h, query, key) are below the threshold.
  const int64_t* seeds;   // [B]; nullptr: no dropout
  int64_t head_offset;
  uint32_t threshold;
  float kept_factor;   // of the weights that are kept

  // whether a problem needs more than a pattern over all of its tokens
  bool has_options() const { return text_lengths || seeds || group > 1 || queries < n; }
};

struct SparseAttentionBackwardArgs {
  SparseAttentionArgs forward;    // out and lse are read
  const int32_t* backward_plan;   // not used on the CPU
  const void* grad_out;
  void *grad_q, *grad_k, *grad_v;
  Strides grad_out_strides, grad_q_strides, grad_k_strides, grad_v_strides;
};

}   // namespace dk
