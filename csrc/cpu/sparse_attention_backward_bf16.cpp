// Backward in bfloat16: the steps of sparse_attention_backward.cpp on the matrix primitive. P and dS are rounded to
// bfloat16 as operands; all other intermediate results are float. Other types, and problems
// with options, use avx512's kernel.
#include "cpu/arena.h"
#include "cpu/attention_tile_bf16.h"

namespace dk::avx512 {
SparseAttentionBackwardKernel sparse_attention_backward(const SparseAttentionBackwardArgs&);
}

namespace dk::DK_ISA {
namespace {

// The state of a tile, passed from `queries` to `keys`: its rows of dO and Q as pairs, and for each key in plan order P
// and dS of the 32 queries.
template <int DP> struct TileCarry {
  TileCarry(float* base, int64_t most_keys) {
    Arena arena{base};
    g = reinterpret_cast<uint32_t*>(arena.take(ROWS / 2 * DP));
    q = reinterpret_cast<uint32_t*>(arena.take(ROWS / 2 * DP));
    p = reinterpret_cast<BFloat16*>(arena.take(most_keys * ROWS / 2));
    ds = reinterpret_cast<BFloat16*>(arena.take(most_keys * ROWS / 2));
    floats = arena.used;
  }
  uint32_t *g, *q;
  BFloat16 *p, *ds;
  int64_t floats;
};

// A thread's buffers for a tile.
template <int DP> struct QueriesSpace {
  // an odd number of cache lines, so that rows map to different cache sets
  QueriesSpace(float* base, int64_t most_keys) : ds_stride(most_keys | BLOCK_KEYS) {
    Arena arena{base};
    q = reinterpret_cast<uint32_t*>(arena.take(ROWS * DP / 2));
    g = reinterpret_cast<uint32_t*>(arena.take(ROWS * DP / 2));
    copy = reinterpret_cast<BFloat16*>(arena.take(BLOCK_KEYS * DP / 2));
    s = arena.take(most_keys * ROWS);
    dp = arena.take(most_keys * ROWS);
    k = reinterpret_cast<uint32_t*>(arena.take(most_keys * DP / 2));
    ds = reinterpret_cast<BFloat16*>(arena.take(ROWS * ds_stride / 2));
    dq = arena.take(ROWS * DP);
    floats = arena.used;
  }
  int64_t ds_stride, floats;
  uint32_t *q, *g;      // [DP / 2][32] pairs of columns
  BFloat16* copy;       // [BLOCK_KEYS][DP]
  float *s, *dp, *dq;   // [keys][32]: S, then weights; dP. [32][DP]
  uint32_t* k;          // [keys / 2][DP] pairs of rows
  BFloat16* ds;         // [32][ds_stride]
};

// A block of 32 keys for one product.
struct KeyBlock {
  int32_t tokens[BLOCK_KEYS];
  const uint32_t* masks[BLOCK_KEYS / GROUP_COLUMNS];
  int count = 0;

  bool add(const int32_t* group, const uint32_t* mask) {   // returns whether the block is full
    masks[count / GROUP_COLUMNS] = mask;
    std::memcpy(tokens + count, group, sizeof(int32_t) * GROUP_COLUMNS);
    count += GROUP_COLUMNS;
    return count == BLOCK_KEYS;
  }
  void fill() {   // pads the block with masked keys
    static constexpr uint32_t hidden[GROUP_COLUMNS] = {};
    int32_t last[GROUP_COLUMNS];
    for (int j = 0; j < GROUP_COLUMNS; ++j) last[j] = tokens[count - 1];
    while (!add(last, hidden)) {
    }
  }
};

// Scales and masks the scores of a block, masks dP, and updates the running maximum.
DK_INLINE void finish_scores(const KeyBlock& block, float factor, float* s, float* dp, Vec (&maximum)[2]) {
  for (int j = 0; j < BLOCK_KEYS; ++j) {
    const uint32_t* mask = block.masks[j / GROUP_COLUMNS];
    const uint32_t visible = mask ? mask[j % GROUP_COLUMNS] : ~0u;
    DK_UNROLL_FOR (int half = 0; half < 2; ++half) {
      const int at = j * ROWS + half * LANES;
      const Vec score = select(visible >> half * LANES, load(s + at) * factor, splat(-INF));
      store(s + at, score);
      maximum[half] = max(maximum[half], score);
      if (mask) store(dp + at, select(visible >> half * LANES, load(dp + at), Vec{}));
    }
  }
}

// P and dS of 32 keys from their weights and dP, one row per key; dS also with one row per query.
DK_INLINE void finish_block(const float* weights, const float* dp, const Vec (&norm)[2], const Vec (&delta)[2],
                            BFloat16* p, BFloat16* ds, BFloat16* ds_rows, int64_t ds_stride) {
  alignas(64) uint32_t pairs[BLOCK_KEYS / 2][ROWS];
  for (int i = 0; i < BLOCK_KEYS / 2; ++i) {
    Vec both[2];
    DK_UNROLL_FOR (int odd = 0; odd < 2; ++odd) {
      const int at = (2 * i + odd) * ROWS;
      const Vec p0 = load(weights + at) * norm[0], p1 = load(weights + at + LANES) * norm[1];
      both[odd] = rounded(p0 * (load(dp + at) - delta[0]), p1 * (load(dp + at + LANES) - delta[1]));
      store(reinterpret_cast<float*>(p + at), rounded(p0, p1));
      store(reinterpret_cast<float*>(ds + at), both[odd]);
    }
    interleave(both[0], both[1], pairs[i]);
  }
  for (int r = 0; r < ROWS; r += LANES) {
    Vec v[LANES];
    DK_UNROLL_FOR (int i = 0; i < LANES; ++i) v[i] = load(reinterpret_cast<const float*>(pairs[i] + r));
    transpose(v);
    DK_UNROLL_FOR (int i = 0; i < LANES; ++i) store(reinterpret_cast<float*>(ds_rows + (r + i) * ds_stride), v[i]);
  }
}

// Computes P and dS from scores, their maximum per query, and dP, for all keys of the tile.
template <int DP>
DK_INLINE void softmax_backward(const QueriesSpace<DP>& w, int count, const Vec (&maximum)[2],
                                const TileCarry<DP>& tile) {
  Vec sum[2] = {}, delta[2] = {}, norm[2];
  for (int j = 0; j < count; ++j)
    DK_UNROLL_FOR (int half = 0; half < 2; ++half) {
      const int at = j * ROWS + half * LANES;
      const Vec weight = exp2_coarse(load(w.s + at) - maximum[half]);
      store(w.s + at, weight);
      sum[half] += weight;
      delta[half] += weight * load(w.dp + at);
    }
  DK_UNROLL_FOR (int half = 0; half < 2; ++half) {
    // already at least 1 or NaN, except for padding rows, which have no keys
    norm[half] = 1.0f / max(splat(1.0f), sum[half]);
    delta[half] *= norm[half];
  }
  for (int j = 0; j < count; j += BLOCK_KEYS)
    finish_block(w.s + j * ROWS, w.dp + j * ROWS, norm, delta, tile.p + j * ROWS, tile.ds + j * ROWS, w.ds + j,
                 w.ds_stride);
}

// Up to 32 keys of a tile: their indices in the tile and their tokens.
struct KeyList {
  int64_t places[BLOCK_KEYS], tokens[BLOCK_KEYS];
  int count = 0;

  bool add(int64_t place, int64_t token) {   // returns whether the list is full
    places[count] = place;
    tokens[count++] = token;
    return count == BLOCK_KEYS;
  }
  bool consecutive() const {   // in the tile and in the sequence
    bool yes = count == BLOCK_KEYS;
    for (int j = 1; j < count; ++j) yes &= places[j] == places[0] + j && tokens[j] == tokens[0] + j;
    return yes;
  }
};

// out[token][DP] += sum_r w[place][r] * x[r][DP], x in pairs. Keys that are not consecutive are gathered first, with
// the same bits.
template <int DP> DK_INLINE void outer(const KeyList& keys, const BFloat16* w, const uint32_t* x, float* out) {
  if (keys.consecutive())
    return multiply<BLOCK_KEYS / 16, DP / 16>(w + keys.places[0] * ROWS, ROWS, x, DP, out + keys.tokens[0] * DP, DP,
                                              ROWS / 2, true);
  alignas(64) BFloat16 rows[BLOCK_KEYS * ROWS] = {};
  alignas(64) float sums[BLOCK_KEYS * DP] = {};
  for (int j = 0; j < keys.count; ++j) {
    std::memcpy(rows + j * ROWS, w + keys.places[j] * ROWS, ROWS * sizeof(BFloat16));
    std::memcpy(sums + j * DP, out + keys.tokens[j] * DP, DP * sizeof(float));
  }
  multiply<BLOCK_KEYS / 16, DP / 16>(rows, ROWS, x, DP, sums, DP, ROWS / 2, true);
  for (int j = 0; j < keys.count; ++j) std::memcpy(out + keys.tokens[j] * DP, sums + j * DP, DP * sizeof(float));
}

// Which of `parts` owns a key. Fibonacci hashing of blocks of 32 keys distributes the blocks of any range of keys
// evenly.
DK_INLINE int64_t owner(int32_t token, int64_t parts) {
  return (static_cast<uint32_t>(token / BLOCK_KEYS) * 2654435769u * static_cast<uint64_t>(parts)) >> 32;
}

template <int DP> struct AttentionBackward {
  static int64_t most_keys(const SparseAttentionBackwardArgs& a) {
    return (Plan(a.forward.plan)[plan_header::most_columns] + BLOCK_KEYS - 1) / BLOCK_KEYS * BLOCK_KEYS;
  }

  // the head buffer: dK and dV
  static SparseAttentionSpace space(const SparseAttentionBackwardArgs& a) {
    return {2 * a.forward.n * DP, TileCarry<DP>(nullptr, most_keys(a)).floats,
            QueriesSpace<DP>(nullptr, most_keys(a)).floats};
  }

  static void prepare(const SparseAttentionBackwardArgs& a, int64_t, int64_t part, int64_t parts, float* head) {
    const int64_t matrices = 2 * a.forward.n * DP, begin = matrices * part / parts, end = matrices * (part + 1) / parts;
    std::memset(head + begin, 0, (end - begin) * sizeof(float));
  }

  static void queries(const SparseAttentionBackwardArgs& a, int64_t bh, int64_t t, const float*, float* carry,
                      float* thread) {
    const FlushDenormals guard;
    const MatrixUnit unit;
    const SparseAttentionArgs& f = a.forward;
    const Plan plan(f.plan);
    const int32_t* tile_rows = plan.rows(t);
    const TileCarry<DP> tile(carry, most_keys(a));
    const QueriesSpace<DP> w(thread, most_keys(a));
    const auto rows = [&](const void* p, const Strides& s) {
      return BFloat16Rows{matrix_of<BFloat16>(p, s, f.heads, bh), s.token};
    };
    const BFloat16Rows q = rows(f.q, f.q_strides), g = rows(a.grad_out, a.grad_out_strides), k = rows(f.k, f.k_strides),
                       v = rows(f.v, f.v_strides);
    pack_columns<DP>(q, tile_rows, f.head_dim, w.q);
    pack_columns<DP>(g, tile_rows, f.head_dim, w.g);
    pack_rows<DP>(q, tile_rows, ROWS, f.head_dim, tile.q);
    pack_rows<DP>(g, tile_rows, ROWS, f.head_dim, tile.g);

    Vec maximum[2] = {splat(EMPTY_MAXIMUM), splat(EMPTY_MAXIMUM)};
    int count = 0;
    KeyBlock block;
    const auto score = [&] {
      const BFloat16Rows keys = left_operand<DP>(k, block.tokens, f.head_dim, w.copy);
      multiply<BLOCK_KEYS / 16, ROWS / 16>(keys.base, keys.stride, w.q, ROWS, w.s + count * ROWS, ROWS, DP / 2, false);
      const BFloat16Rows values = left_operand<DP>(v, block.tokens, f.head_dim, w.copy);
      multiply<BLOCK_KEYS / 16, ROWS / 16>(values.base, values.stride, w.g, ROWS, w.dp + count * ROWS, ROWS, DP / 2,
                                           false);
      pack_rows<DP>(k, block.tokens, BLOCK_KEYS, f.head_dim, w.k + count / 2 * DP);
      finish_scores(block, f.scale * LOG2E, w.s + count * ROWS, w.dp + count * ROWS, maximum);
      count += BLOCK_KEYS;
      block.count = 0;
    };
    for_each_group(plan, AbsentText(), t, [&](const int32_t* tokens, const uint32_t* mask) {
      if (block.add(tokens, mask)) score();
    });
    if (block.count) {
      block.fill();
      score();
    }
    softmax_backward(w, count, maximum, tile);

    constexpr int SLAB = 128;   // keys whose pairs stay in the L1 cache
    for (int j = 0; j < count; j += SLAB)
      multiply<ROWS / 16, DP / 16>(w.ds + j, w.ds_stride, w.k + j / 2 * DP, DP, w.dq, DP,
                                   (count - j < SLAB ? count - j : SLAB) / 2, j > 0);
    BFloat16* out = matrix_of<BFloat16>(a.grad_q, a.grad_q_strides, f.heads, bh);
    for (int r = 0; r < ROWS; ++r)
      if (tile_rows[r] >= 0)
        round_row<DP>(w.dq + r * DP, f.scale, f.head_dim, out + tile_rows[r] * a.grad_q_strides.token);
  }

  static void keys_of_tile(const Plan& plan, int64_t t, int64_t part, int64_t parts, float* grad_k, float* grad_v,
                           const TileCarry<DP>& tile) {
    KeyList list;
    const auto add_outer = [&] {
      outer<DP>(list, tile.p, tile.g, grad_v);
      outer<DP>(list, tile.ds, tile.q, grad_k);
      list.count = 0;
    };
    int64_t place = 0;
    for_each_group(plan, AbsentText(), t, [&](const int32_t* tokens, const uint32_t* mask) {
      for (int j = 0; j < GROUP_COLUMNS; ++j, ++place) {
        const bool hidden = mask && mask[j] == 0;   // also true for padding, which must not be listed twice
        if (!hidden && owner(tokens[j], parts) == part && list.add(place, tokens[j])) add_outer();
      }
    });
    if (list.count) add_outer();
  }

  static void keys(const SparseAttentionBackwardArgs& a, int64_t bh, int64_t tile_begin, int64_t tile_end, int64_t part,
                   int64_t parts, float* head, const float* carry) {
    const FlushDenormals guard;
    const MatrixUnit unit;
    const SparseAttentionArgs& f = a.forward;
    const Plan plan(f.plan);
    float *grad_k = head, *grad_v = head + f.n * DP;
    for (int64_t t = tile_begin; t < tile_end; ++t) {
      const TileCarry<DP> tile(const_cast<float*>(carry), most_keys(a));
      keys_of_tile(plan, t, part, parts, grad_k, grad_v, tile);
      carry += tile.floats;
    }
    if (tile_end < plan.tiles()) return;
    BFloat16 *out_k = matrix_of<BFloat16>(a.grad_k, a.grad_k_strides, f.heads, bh),
             *out_v = matrix_of<BFloat16>(a.grad_v, a.grad_v_strides, f.heads, bh);
    for (int64_t i = 0; i < f.n; ++i) {
      if (owner(i, parts) != part) continue;
      round_row<DP>(grad_k + i * DP, f.scale, f.head_dim, out_k + i * a.grad_k_strides.token);
      round_row<DP>(grad_v + i * DP, 1.0f, f.head_dim, out_v + i * a.grad_v_strides.token);
    }
  }

  static SparseAttentionBackwardKernel call() { return {space, prepare, queries, keys}; }
};

}   // namespace

SparseAttentionBackwardKernel sparse_attention_backward(const SparseAttentionBackwardArgs& a) {
  const bool here = a.forward.dtype == DType::bfloat16 && !a.forward.has_options();
  return here ? dispatch_dim<AttentionBackward>(a.forward.head_dim) : avx512::sparse_attention_backward(a);
}

}   // namespace dk::DK_ISA
