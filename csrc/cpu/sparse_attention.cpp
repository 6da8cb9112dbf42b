// Forward: for every work item, an online softmax of 32 queries over chunks of the keys that the plan lists.
#include "cpu/attention_tile.h"

namespace dk::DK_ISA {
namespace {

template <int DP> struct ForwardSpace {
  alignas(64) float qt[DP * ROWS], s[CHUNK_KEYS * ROWS];
  const float* values[CHUNK_KEYS];
  uint32_t kept[CHUNK_KEYS];
};

// Replaces the chunk's scores with weights, rescales the unnormalised output, and adds the chunk's weighted values.
template <int DP>
DK_INLINE void add_chunk(ForwardSpace<DP>& w, const Dropout& dropout, int count, TileState<DP>& tile) {
  for (int r = 0; r < ROWS; r += LANES) {
    SoftmaxState<> state = tile.at(r);
    const Vec alpha = state.update(w.s + r, ROWS, count, Exp{});
    tile.put(r, state);
    for (int d = 0; d < DP; ++d) store(tile.out + d * ROWS + r, load(tile.out + d * ROWS + r) * alpha);
  }
  dropout.apply(w.kept, count, 1.0f, w.s);
  accumulate<DP>(w.s, w.values, count, tile.out);
}

template <class T, int DP> struct AttentionForward {
  static void attend(const SparseAttentionArgs& a, int64_t bh, const Plan::Item& item, const float* head, float* carry,
                     float* thread) {
    const FlushDenormals guard;
    const Plan plan(a.plan);
    const FloatHead<T, DP> rows(a, bh, head);
    auto& w = *reinterpret_cast<ForwardSpace<DP>*>(thread);
    auto& tile = *reinterpret_cast<TileState<DP>*>(carry);
    const AbsentText absent(a, bh);
    const Dropout dropout(a, bh);
    int32_t present[ROWS];
    absent.present(plan.rows(item.tile), present);
    pack_transposed<T, DP>(matrix_of<T>(a.q, a.q_strides, a.heads, bh), a.q_strides.token, present, a.head_dim, w.qt);
    std::memset(tile.out, 0, sizeof(tile.out));
    tile.clear_softmax();
    int count = 0;
    for_each_group(plan, absent, item.begin, item.end, [&](const int32_t* tokens, const uint32_t* mask) {
      const float* keys[GROUP_COLUMNS];
      for (int j = 0; j < GROUP_COLUMNS; ++j) {
        keys[j] = rows.k.row(tokens[j]);
        w.values[count + j] = rows.v.row(tokens[j]);
      }
      float* s = w.s + count * ROWS;
      products<DP>(w.qt, keys, a.scale, s);
      if (mask) apply_mask(mask, -INF, s);
      dropout.draw(present, tokens, w.kept + count);
      count += GROUP_COLUMNS;
      if (count == CHUNK_KEYS) {
        add_chunk<DP>(w, dropout, count, tile);
        count = 0;
      }
    });
    if (count) add_chunk<DP>(w, dropout, count, tile);
  }

  static void merge(TileState<DP>& tile, const TileState<DP>& other) {
    alignas(64) float alpha[ROWS], beta[ROWS];
    tile.merge_softmax(other, 1.0f, alpha, beta);
    for (int d = 0; d < DP; ++d)
      for (int r = 0; r < ROWS; r += LANES) {
        const int at = d * ROWS + r;
        store(tile.out + at, load(tile.out + at) * load(alpha + r) + load(other.out + at) * load(beta + r));
      }
  }

  static SparseAttentionSpace space(const SparseAttentionArgs& a) {
    return {FloatHead<T, DP>::floats(a), sizeof(TileState<DP>) / sizeof(float),
            (sizeof(ForwardSpace<DP>) + 63) / 64 * 16};
  }

  static void finish(const SparseAttentionArgs& a, int64_t bh, int64_t t, float* carry, int64_t items) {
    const FlushDenormals guard;
    TileState<DP>& tile = *reinterpret_cast<TileState<DP>*>(carry);
    for (int64_t i = 1; i < items; ++i) merge(tile, (&tile)[i]);
    for (int d = 0; d < DP; ++d)
      for (int r = 0; r < ROWS; r += LANES)
        store(tile.out + d * ROWS + r, tile.at(r).normalize(load(tile.out + d * ROWS + r)));
    const int32_t* rows = Plan(a.plan).rows(t);
    const AbsentText absent(a, bh);
    float* lse = a.lse + bh * a.queries;
    for (int r = 0; r < ROWS; ++r) {
      if (absent.has(rows[r]))
        for (int d = 0; d < DP; ++d) tile.out[d * ROWS + r] = 0.0f;
      if (rows[r] >= 0) lse[rows[r]] = absent.has(rows[r]) ? -INF : tile.log_sum_exp(r, 1.0f);
    }
    unpack_transposed<T, DP>(tile.out, rows, a.head_dim, a.kept_factor, matrix_of<T>(a.out, a.out_strides, a.heads, bh),
                             a.out_strides.token);
  }

  static SparseAttentionKernel call() { return {space, FloatHead<T, DP>::prepare, attend, finish}; }
};

}   // namespace

SparseAttentionKernel sparse_attention(const SparseAttentionArgs& a) {
  return dispatch<AttentionForward>(a.dtype, a.head_dim);
}

}   // namespace dk::DK_ISA
