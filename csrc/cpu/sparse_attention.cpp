// Forward: for every tile of 32 queries, softmax over the keys the plan lists, online over chunks of keys.
#include "cpu/attention_tile.h"

namespace dk::DK_ISA {

template <int DP> struct ForwardSpace {
  alignas(64) float qt[DP * ROWS], ot[DP * ROWS], s[CHUNK * ROWS], max[ROWS], sum[ROWS];
  const float* values[CHUNK];
};

// Turns the chunk's scores into weights, rescales what was accumulated, and adds the chunk's values.
template <int DP> DK_INLINE void absorb_chunk(ForwardSpace<DP>& w, int count) {
  for (int r = 0; r < ROWS; r += LANES) {
    const Vec old_max = load(w.max + r);
    Vec new_max = old_max, sum{};
    for (int j = 0; j < count; ++j) new_max = max(new_max, load(w.s + j * ROWS + r));
    for (int j = 0; j < count; ++j) {
      const Vec p = exp(load(w.s + j * ROWS + r) - new_max);
      sum += p;
      store(w.s + j * ROWS + r, p);
    }
    const Vec keep = exp(old_max - new_max);
    store(w.max + r, new_max);
    store(w.sum + r, load(w.sum + r) * keep + sum);
    for (int d = 0; d < DP; ++d) store(w.ot + d * ROWS + r, load(w.ot + d * ROWS + r) * keep);
  }
  accumulate<DP>(w.s, w.values, count, w.ot);
}

template <class T, int DP> struct Forward {
  static void tile(const SparseAttentionArgs& a, const Plan& plan, int64_t t, const T* q, FloatRows k, FloatRows v, T* out, float* lse,
                   ForwardSpace<DP>& w) {
    const int32_t* rows = plan.rows(t);
    pack_transposed<T, DP>(q, a.q_strides.token, rows, a.head_dim, w.qt);
    std::memset(w.ot, 0, sizeof(w.ot));
    for (int r = 0; r < ROWS; r += LANES) {
      store(w.max + r, splat(LOWEST));
      store(w.sum + r, Vec{});
    }
    int count = 0;
    for_each_group(plan, t, [&](const int32_t* tokens, const uint32_t* mask) {
      const float* keys[GROUP_COLUMNS];
      for (int j = 0; j < GROUP_COLUMNS; ++j) {
        keys[j] = k.row(tokens[j]);
        w.values[count + j] = v.row(tokens[j]);
      }
      float* s = w.s + count * ROWS;
      products<DP>(w.qt, keys, a.scale, s);
      if (mask) apply_mask(mask, -INF, s);
      count += GROUP_COLUMNS;
      if (count == CHUNK) {
        absorb_chunk<DP>(w, count);
        count = 0;
      }
    });
    if (count) absorb_chunk<DP>(w, count);

    for (int d = 0; d < DP; ++d)
      for (int r = 0; r < ROWS; r += LANES) store(w.ot + d * ROWS + r, load(w.ot + d * ROWS + r) / load(w.sum + r));
    unpack_transposed<T, DP>(w.ot, rows, a.head_dim, 1.0f, out, a.out_strides.token);
    for (int r = 0; r < ROWS; ++r)
      if (rows[r] >= 0) lse[rows[r]] = static_cast<float>(w.max[r] + __builtin_log(w.sum[r]));
  }

  static SparseAttentionSpace space(const SparseAttentionArgs& a) {
    return {FloatHead<T, DP>::floats(a), 0, (sizeof(ForwardSpace<DP>) + 63) / 64 * 16};
  }

  static void run(const SparseAttentionArgs& a, int64_t bh, int64_t tile_begin, int64_t tile_end, const float* head, float* thread) {
    const FlushDenormals guard;
    const FloatHead<T, DP> keys(a, bh, head);
    const T* q = matrix_of<T>(a.q, a.q_strides, a.heads, bh);
    T* out = matrix_of<T>(a.out, a.out_strides, a.heads, bh);
    const Plan plan(a.plan);
    for (int64_t t = tile_begin; t < tile_end; ++t) tile(a, plan, t, q, keys.k, keys.v, out, a.lse + bh * a.n, *reinterpret_cast<ForwardSpace<DP>*>(thread));
  }

  static SparseAttentionKernel call() { return {space, FloatHead<T, DP>::prepare, run}; }
};

SparseAttentionKernel sparse_attention(const SparseAttentionArgs& a) { return dispatch<Forward>(a.dtype, a.head_dim); }

}  // namespace dk::DK_ISA
