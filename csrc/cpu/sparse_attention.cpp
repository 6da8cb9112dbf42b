// Forward: for every work item, softmax of 32 queries over the keys that the plan lists, online over chunks of keys.
#include "cpu/attention_tile.h"

namespace dk::DK_ISA {

template <int DP> struct ForwardSpace {
  alignas(64) float qt[DP * ROWS], s[CHUNK * ROWS];
  const float* values[CHUNK];
};

// Turns the chunk's scores into weights, rescales what was accumulated, and adds the chunk's values.
template <int DP> DK_INLINE void absorb_chunk(ForwardSpace<DP>& w, int count, Partial<DP>& to) {
  for (int r = 0; r < ROWS; r += LANES) {
    const Vec old_max = load(to.max + r);
    Vec new_max = old_max, sum{};
    for (int j = 0; j < count; ++j) new_max = max(new_max, load(w.s + j * ROWS + r));
    for (int j = 0; j < count; ++j) {
      const Vec p = exp(load(w.s + j * ROWS + r) - new_max);
      sum += p;
      store(w.s + j * ROWS + r, p);
    }
    const Vec keep = exp(old_max - new_max);
    store(to.max + r, new_max);
    store(to.sum + r, load(to.sum + r) * keep + sum);
    for (int d = 0; d < DP; ++d) store(to.o + d * ROWS + r, load(to.o + d * ROWS + r) * keep);
  }
  accumulate<DP>(w.s, w.values, count, to.o);
}

template <class T, int DP> struct Forward {
  static void attend(const SparseAttentionArgs& a, int64_t bh, const Plan::Item& item, const float* head, float* left, float* thread) {
    const FlushDenormals guard;
    const Plan plan(a.plan);
    const FloatHead<T, DP> rows(a, bh, head);
    auto& w = *reinterpret_cast<ForwardSpace<DP>*>(thread);
    auto& to = *reinterpret_cast<Partial<DP>*>(left);
    pack_transposed<T, DP>(matrix_of<T>(a.q, a.q_strides, a.heads, bh), a.q_strides.token, plan.rows(item.tile), a.head_dim, w.qt);
    std::memset(to.o, 0, sizeof(to.o));
    for (int r = 0; r < ROWS; r += LANES) {
      store(to.max + r, splat(LOWEST));
      store(to.sum + r, Vec{});
    }
    int count = 0;
    for_each_group(plan, item.begin, item.end, [&](const int32_t* tokens, const uint32_t* mask) {
      const float* keys[GROUP_COLUMNS];
      for (int j = 0; j < GROUP_COLUMNS; ++j) {
        keys[j] = rows.k.row(tokens[j]);
        w.values[count + j] = rows.v.row(tokens[j]);
      }
      float* s = w.s + count * ROWS;
      products<DP>(w.qt, keys, a.scale, s);
      if (mask) apply_mask(mask, -INF, s);
      count += GROUP_COLUMNS;
      if (count == CHUNK) {
        absorb_chunk<DP>(w, count, to);
        count = 0;
      }
    });
    if (count) absorb_chunk<DP>(w, count, to);
  }

  static void join(Partial<DP>& to, const Partial<DP>& from) {
    alignas(64) float keep[ROWS], add[ROWS];
    join_statistics(to, from, 1.0f, keep, add);
    for (int d = 0; d < DP; ++d)
      for (int r = 0; r < ROWS; r += LANES) {
        const int at = d * ROWS + r;
        store(to.o + at, load(to.o + at) * load(keep + r) + load(from.o + at) * load(add + r));
      }
  }

  static SparseAttentionSpace space(const SparseAttentionArgs& a) {
    return {FloatHead<T, DP>::floats(a), sizeof(Partial<DP>) / sizeof(float), (sizeof(ForwardSpace<DP>) + 63) / 64 * 16};
  }

  static void finish(const SparseAttentionArgs& a, int64_t bh, int64_t t, float* left, int64_t items) {
    const FlushDenormals guard;
    Partial<DP>& tile = *reinterpret_cast<Partial<DP>*>(left);
    for (int64_t i = 1; i < items; ++i) join(tile, (&tile)[i]);
    for (int d = 0; d < DP; ++d)
      for (int r = 0; r < ROWS; r += LANES) store(tile.o + d * ROWS + r, load(tile.o + d * ROWS + r) / load(tile.sum + r));
    const int32_t* rows = Plan(a.plan).rows(t);
    unpack_transposed<T, DP>(tile.o, rows, a.head_dim, 1.0f, matrix_of<T>(a.out, a.out_strides, a.heads, bh), a.out_strides.token);
    float* lse = a.lse + bh * a.n;
    for (int r = 0; r < ROWS; ++r)
      if (rows[r] >= 0) lse[rows[r]] = static_cast<float>(tile.max[r] + __builtin_log(tile.sum[r]));
  }

  static SparseAttentionKernel call() { return {space, FloatHead<T, DP>::prepare, attend, finish}; }
};

SparseAttentionKernel sparse_attention(const SparseAttentionArgs& a) { return dispatch<Forward>(a.dtype, a.head_dim); }

}  // namespace dk::DK_ISA
