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
  static constexpr int64_t SPACE = (sizeof(ForwardSpace<DP>) + 3) / 4;

  static int64_t copy_floats(const SparseAttentionArgs& a) { return sizeof(T) == 4 && a.head_dim == DP ? 0 : a.n * DP; }

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

  static void call(const SparseAttentionArgs& a, float* workspace, int64_t bh, int64_t tile_begin, int64_t tile_end) {
    const FlushDenormals guard;
    const int64_t b = bh / a.heads, h = bh % a.heads;
    const auto at = [&](const void* p, const Strides& s) { return static_cast<const T*>(p) + b * s.batch + h * s.head; };
    auto& w = *reinterpret_cast<ForwardSpace<DP>*>(workspace);
    float* copy = workspace + SPACE;
    const FloatRows k = float_rows<T, DP>(at(a.k, a.k_strides), a.k_strides.token, a.n, a.head_dim, copy);
    const FloatRows v = float_rows<T, DP>(at(a.v, a.v_strides), a.v_strides.token, a.n, a.head_dim, copy + copy_floats(a));
    T* out = const_cast<T*>(at(a.out, a.out_strides));
    const Plan plan(a.plan);
    for (int64_t t = tile_begin; t < tile_end; ++t) tile(a, plan, t, at(a.q, a.q_strides), k, v, out, a.lse + bh * a.n, w);
  }
};

template <class T, int DP> struct ForwardWorkspace {
  static int64_t call(const SparseAttentionArgs& a) { return Forward<T, DP>::SPACE + 2 * Forward<T, DP>::copy_floats(a); }
};

static int64_t workspace(const SparseAttentionArgs& a) { return dispatch<ForwardWorkspace>(a.dtype, a.head_dim, a); }
static void run(const SparseAttentionArgs& a, float* workspace, int64_t bh, int64_t tile_begin, int64_t tile_end) {
  dispatch<Forward>(a.dtype, a.head_dim, a, workspace, bh, tile_begin, tile_end);
}

extern const SparseAttentionKernel sparse_attention;
const SparseAttentionKernel sparse_attention = {workspace, run};

}  // namespace dk::DK_ISA
