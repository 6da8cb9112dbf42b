// Backward of one (batch, head), tile by tile in plan order. dK and dV are accumulated in that order: no atomics, and
// the same bits for every split of the work. A tile stores the weights of all its keys, so they are normalised as in a
// plain softmax, and neither out nor lse is read:
//   P = softmax(S),  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dV = P^T dO,  dQ = dS K * scale,  dK = dS^T Q *
//   scale.
// Dropout multiplies dP, and P in dV, by 0 or kept_factor. Heads that share K and V follow one another, as if their
// tiles were those of one head: the tile at index i is tile i % tiles of head i / tiles among them.
#include "cpu/arena.h"
#include "cpu/attention_tile.h"

namespace dk::DK_ISA {
namespace {

// A thread's buffers for a tile: transposed rows of Q, dO and dQ, and for each key a pointer to its row and its bits
// of Dropout::draw.
template <int DP> struct QueriesSpace {
  QueriesSpace(float* base, int64_t most_keys) {
    Arena arena{base};
    qt = arena.take(DP * ROWS), gt = arena.take(DP * ROWS), dqt = arena.take(DP * ROWS);
    keys = reinterpret_cast<const float**>(arena.take(most_keys * static_cast<int64_t>(sizeof(float*)) / 4));
    kept = reinterpret_cast<uint32_t*>(arena.take(most_keys));
    floats = arena.used;
  }
  float *qt, *gt, *dqt;
  const float** keys;
  uint32_t* kept;
  int64_t floats;
};

// The state of a tile, passed from `queries` to `keys`: rows of Q * scale and of dO, and for each key in plan order S,
// later P, and dP, later dS.
template <int DP> struct TileCarry {
  static int64_t floats(int64_t most_keys) { return 2 * ROWS * (DP + most_keys); }
  TileCarry(float* carry, int64_t most_keys) : q(carry), g(q + ROWS * DP), p(g + ROWS * DP), ds(p + most_keys * ROWS) {}
  float *q, *g, *p, *ds;
};

// Computes P and dS from scores and dP, for all keys of the tile.
DK_INLINE void softmax_backward(float* p, float* ds, int count) {
  for (int r = 0; r < ROWS; r += LANES) {
    const Vec maximum = running_maximum(splat(EMPTY_MAXIMUM), p + r, ROWS, count);
    // already at least 1 or NaN, except for padding rows, which have no keys
    const Vec sum = max(splat(1.0f), weigh(p + r, ROWS, count, maximum, Exp{}));
    Vec delta{};
    for (int j = 0; j < count; ++j) {
      const Vec weight = load(p + j * ROWS + r) / sum;
      store(p + j * ROWS + r, weight);
      delta += weight * load(ds + j * ROWS + r);
    }
    for (int j = 0; j < count; ++j) {
      const int at = j * ROWS + r;
      store(ds + at, load(p + at) * (load(ds + at) - delta));
    }
  }
}

// The contribution of one key of a tile to dV and dK, and its destination.
struct KeyUpdate {
  const float *p, *ds;
  float *grad_v, *grad_k;
};

// out(i)[DP] += sum_r w(i)[r] * x[r][DP] for COUNT keys
template <int DP, int COUNT>
DK_INLINE void outer(const KeyUpdate* keys, const float* KeyUpdate::* w, const float* x, float* KeyUpdate::* out) {
  constexpr int WIDE = LANES == 16 && DP % 64 == 0 ? 4 : 2;   // vectors per register block
  for (int d = 0; d < DP; d += WIDE * LANES) {
    Vec acc[COUNT][WIDE] = {};
    for (int r = 0; r < ROWS; ++r) {
      Vec row[WIDE];
      DK_UNROLL_FOR (int i = 0; i < WIDE; ++i) row[i] = load(x + r * DP + d + i * LANES);
      DK_UNROLL_FOR (int j = 0; j < COUNT; ++j)
        DK_UNROLL_FOR (int i = 0; i < WIDE; ++i) acc[j][i] += row[i] * (keys[j].*w)[r];
    }
    DK_UNROLL_FOR (int j = 0; j < COUNT; ++j)
      DK_UNROLL_FOR (int i = 0; i < WIDE; ++i) {
        float* o = keys[j].*out + d + i * LANES;
        store(o, load(o) + acc[j][i]);
      }
  }
}
template <int DP, int COUNT> DK_INLINE void add_outer(const KeyUpdate* keys, const TileCarry<DP>& tile) {
  outer<DP, COUNT>(keys, &KeyUpdate::p, tile.g, &KeyUpdate::grad_v);
  outer<DP, COUNT>(keys, &KeyUpdate::ds, tile.q, &KeyUpdate::grad_k);
}

// Which of `parts` owns a key. Fibonacci hashing of blocks of 16 keys distributes the blocks of any range of keys
// evenly.
DK_INLINE int64_t owner(int32_t token, int64_t parts) {
  return (static_cast<uint32_t>(token / 16) * 2654435769u * static_cast<uint64_t>(parts)) >> 32;
}

template <class T, int DP> struct AttentionBackward {
  // the head buffer: dK and dV, then copies of K and V
  static SparseAttentionSpace space(const SparseAttentionBackwardArgs& a) {
    const int64_t most_keys = Plan(a.forward.plan)[plan_header::most_columns];
    return {2 * a.forward.n * DP + FloatHead<T, DP>::floats(a.forward), TileCarry<DP>::floats(most_keys),
            QueriesSpace<DP>(nullptr, most_keys).floats};
  }

  static void prepare(const SparseAttentionBackwardArgs& a, int64_t shared, int64_t part, int64_t parts, float* head) {
    const int64_t matrices = 2 * a.forward.n * DP, begin = matrices * part / parts, end = matrices * (part + 1) / parts;
    std::memset(head + begin, 0, (end - begin) * sizeof(float));
    FloatHead<T, DP>::prepare(a.forward, shared * a.forward.group, part, parts, head + matrices);
  }

  static void fetch_queries(const SparseAttentionBackwardArgs& a, int64_t bh, const int32_t* rows,
                            const TileCarry<DP>& tile, const QueriesSpace<DP>& w) {
    const SparseAttentionArgs& f = a.forward;
    const T *q = matrix_of<T>(f.q, f.q_strides, f.heads, bh),
            *g = matrix_of<T>(a.grad_out, a.grad_out_strides, f.heads, bh);
    for (int r = 0; r < ROWS; r += LANES) {
      fetch_rows<T, DP>(q, f.q_strides.token, rows + r, f.head_dim, tile.q + r * DP);
      fetch_rows<T, DP>(g, a.grad_out_strides.token, rows + r, f.head_dim, tile.g + r * DP);
      transpose_rows(tile.q + r * DP, DP, DP, w.qt + r, ROWS);
      transpose_rows(tile.g + r * DP, DP, DP, w.gt + r, ROWS);
    }
    for (int i = 0; i < ROWS * DP; ++i) tile.q[i] *= f.scale;
  }

  static void queries(const SparseAttentionBackwardArgs& a, int64_t shared, int64_t index, const float* head,
                      float* carry, float* thread) {
    const FlushDenormals guard;
    const SparseAttentionArgs& f = a.forward;
    const Plan plan(f.plan);
    const int64_t bh = shared * f.group + index / plan.tiles(), t = index % plan.tiles();
    const FloatHead<T, DP> rows(f, bh, head + 2 * f.n * DP);
    const TileCarry<DP> tile(carry, plan[plan_header::most_columns]);
    const QueriesSpace<DP> w(thread, plan[plan_header::most_columns]);
    const AbsentText absent(f, bh);
    const Dropout dropout(f, bh);
    int32_t present[ROWS];
    absent.present(plan.rows(t), present);
    fetch_queries(a, bh, present, tile, w);
    int count = 0;
    for_each_group(plan, absent, t, [&](const int32_t* tokens, const uint32_t* mask) {
      const float *values[GROUP_COLUMNS], **keys = w.keys + count;
      for (int j = 0; j < GROUP_COLUMNS; ++j) {
        keys[j] = rows.k.row(tokens[j]);
        values[j] = rows.v.row(tokens[j]);
      }
      float *p = tile.p + count * ROWS, *ds = tile.ds + count * ROWS;
      products<DP>(w.qt, keys, f.scale, p);
      products<DP>(w.gt, values, 1.0f, ds);
      dropout.draw(present, tokens, w.kept + count);
      dropout.apply(w.kept + count, GROUP_COLUMNS, f.kept_factor, ds);
      if (mask) {
        apply_mask(mask, -INF, p);
        apply_mask(mask, 0.0f, ds);
      }
      count += GROUP_COLUMNS;
    });
    softmax_backward(tile.p, tile.ds, count);
    dropout.apply(w.kept, count, f.kept_factor, tile.p);
    std::memset(w.dqt, 0, DP * ROWS * sizeof(float));
    accumulate<DP>(tile.ds, w.keys, count, w.dqt);
    unpack_transposed<T, DP>(w.dqt, plan.rows(t), f.head_dim, f.scale,
                             matrix_of<T>(a.grad_q, a.grad_q_strides, f.heads, bh), a.grad_q_strides.token);
  }

  static void keys_of_tile(const Plan& plan, const AbsentText& absent, int64_t t, int64_t part, int64_t parts,
                           float* grad_k, float* grad_v, const TileCarry<DP>& tile) {
    KeyUpdate updates[4];
    int count = 0, owned = 0;
    for_each_group(plan, absent, t, [&](const int32_t* tokens, const uint32_t*) {
      for (int j = 0; j < GROUP_COLUMNS; ++j) {
        if (owner(tokens[j], parts) != part) continue;
        const int64_t weights = (count + j) * ROWS, row = int64_t{tokens[j]} * DP;
        updates[owned++] = {tile.p + weights, tile.ds + weights, grad_v + row, grad_k + row};
        if (owned == 4) {
          add_outer<DP, 4>(updates, tile);
          owned = 0;
        }
      }
      count += GROUP_COLUMNS;
    });
    for (int i = 0; i < owned; ++i) add_outer<DP, 1>(updates + i, tile);
  }

  static void keys(const SparseAttentionBackwardArgs& a, int64_t shared, int64_t begin, int64_t end, int64_t part,
                   int64_t parts, float* head, const float* carry) {
    const FlushDenormals guard;
    const SparseAttentionArgs& f = a.forward;
    const Plan plan(f.plan);
    const int64_t most_keys = plan[plan_header::most_columns];
    const int64_t heads = f.heads / f.group;   // of K and V
    const AbsentText absent(f, shared * f.group);
    float *grad_k = head, *grad_v = head + f.n * DP;
    for (int64_t i = begin; i < end; ++i, carry += TileCarry<DP>::floats(most_keys))
      keys_of_tile(plan, absent, i % plan.tiles(), part, parts, grad_k, grad_v,
                   TileCarry<DP>(const_cast<float*>(carry), most_keys));
    if (end < plan.tiles() * f.group) return;
    T *out_k = matrix_of<T>(a.grad_k, a.grad_k_strides, heads, shared),
      *out_v = matrix_of<T>(a.grad_v, a.grad_v_strides, heads, shared);
    for (int64_t i = 0; i < f.n; ++i) {
      if (owner(i, parts) != part) continue;
      store_row(grad_k + i * DP, out_k + i * a.grad_k_strides.token, f.head_dim);
      store_row(grad_v + i * DP, out_v + i * a.grad_v_strides.token, f.head_dim);
    }
  }

  static SparseAttentionBackwardKernel call() { return {space, prepare, queries, keys}; }
};

}   // namespace

SparseAttentionBackwardKernel sparse_attention_backward(const SparseAttentionBackwardArgs& a) {
  return dispatch<AttentionBackward>(a.forward.dtype, a.forward.head_dim);
}

}   // namespace dk::DK_ISA
