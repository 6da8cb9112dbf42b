// Forward in bfloat16: for every work item, an online softmax of 32 queries over chunks of the keys that the plan
// lists. Other types, and problems with options, use avx512's kernel.
#include "cpu/attention_tile_bf16.h"

namespace dk::avx512 {
SparseAttentionKernel sparse_attention(const SparseAttentionArgs&);
}

namespace dk::DK_ISA {
namespace {

// Keys and values of one (batch, head), prepared for all its tiles: K padded to DP, and V as pairs of adjacent rows,
// [n / 2][DP].
template <int DP> struct PackedHead {
  static int64_t floats(int64_t n) { return (n + 1) / 2 * 2 * DP; }

  PackedHead(int64_t n, const float* head) : PackedHead(n, const_cast<float*>(head)) {}
  PackedHead(int64_t n, float* head)
      : k(reinterpret_cast<BFloat16*>(head)), v(reinterpret_cast<uint32_t*>(head + (n + 1) / 2 * DP)) {}

  static void prepare(const SparseAttentionArgs& a, int64_t bh, int64_t part, int64_t parts, float* head) {
    const BFloat16Rows k{matrix_of<BFloat16>(a.k, a.k_strides, a.heads, bh), a.k_strides.token},
        v{matrix_of<BFloat16>(a.v, a.v_strides, a.heads, bh), a.v_strides.token};
    const PackedHead packed(a.n, head);
    const int64_t pairs = (a.n + 1) / 2;
    for (int64_t i = pairs * part / parts; i < pairs * (part + 1) / parts; ++i) {
      const int32_t first = 2 * i, second = first + 1 < a.n ? first + 1 : -1;
      for (int d = 0; d < DP; d += 32) {
        store(reinterpret_cast<float*>(packed.k + first * DP + d), k.pairs(first, d, a.head_dim));
        store(reinterpret_cast<float*>(packed.k + (first + 1) * DP + d), k.pairs(second, d, a.head_dim));
        interleave(v.pairs(first, d, a.head_dim), v.pairs(second, d, a.head_dim), packed.v + i * DP + d);
      }
    }
  }

  // Rows of values as pairs: in place if `tokens` are consecutive, else packed into `copy`.
  const uint32_t* values(BFloat16Rows rows, const int32_t* tokens, int count, int head_dim, uint32_t* copy) const {
    int32_t off = tokens[0] % 2;
    for (int j = 0; j < count; ++j) off |= tokens[0] + j - tokens[j];
    if (off == 0) return v + tokens[0] / 2 * DP;
    pack_rows<DP>(rows, tokens, count, head_dim, copy);
    return copy;
  }

  BFloat16* k;
  uint32_t* v;
};

template <int DP> struct ForwardSpace {
  alignas(64) uint32_t q[DP / 2 * ROWS], v[CHUNK_KEYS / 2 * DP];   // pairs
  alignas(64) BFloat16 k[BLOCK_KEYS * DP], p[ROWS * CHUNK_KEYS];
  alignas(64) float s[CHUNK_KEYS * ROWS], alpha[ROWS];
  int32_t tokens[CHUNK_KEYS];
  const uint32_t* masks[CHUNK_KEYS / GROUP_COLUMNS];
};
constexpr uint32_t HIDDEN[GROUP_COLUMNS] = {};

struct Exp2Coarse {
  float scale;
  DK_INLINE Vec operator()(Vec x) const { return exp2_coarse(x * scale); }
};

// Computes weights p[query][key] from the chunk's scores, and updates the softmax.
template <int DP>
DK_INLINE void weigh_chunk(ForwardSpace<DP>& w, TileState<DP>& tile, int count, const Exp2Coarse& weight) {
  for (int r = 0; r < ROWS; r += LANES) {
    const float* s = w.s + r;
    SoftmaxState<> state = tile.at(r);
    const Vec maximum = running_maximum(state.maximum, s, ROWS, count);
    Vec sum{};
    for (int j = 0; j < count; j += BLOCK_KEYS) {
      Vec pairs[LANES];
      DK_UNROLL_FOR (int i = 0; i < LANES; ++i) {
        const Vec first = weight(load(s + (j + 2 * i) * ROWS) - maximum);
        const Vec second = weight(load(s + (j + 2 * i + 1) * ROWS) - maximum);
        sum += first + second;
        pairs[i] = pair_up(first, second);
      }
      transpose(pairs);
      DK_UNROLL_FOR (int i = 0; i < LANES; ++i)
        store(reinterpret_cast<float*>(w.p + (r + i) * CHUNK_KEYS + j), pairs[i]);
    }
    store(w.alpha + r, state.update(maximum, sum, weight));
    tile.put(r, state);
  }
}

template <int DP> struct AttentionForward {
  const SparseAttentionArgs& a;
  const BFloat16Rows q, v;
  const PackedHead<DP> head;
  ForwardSpace<DP>& w;
  TileState<DP>& tile;

  // Pads the chunk with masked keys to whole products.
  int fill(int count) const {
    for (; count % BLOCK_KEYS; count += GROUP_COLUMNS) {
      for (int j = 0; j < GROUP_COLUMNS; ++j) w.tokens[count + j] = w.tokens[count - 1];
      w.masks[count / GROUP_COLUMNS] = HIDDEN;
    }
    return count;
  }

  void add_chunk(int count, bool first) const {
    count = fill(count);
    for (int j = 0; j < count; j += BLOCK_KEYS) {
      const BFloat16Rows keys = left_operand<DP>({head.k, DP}, w.tokens + j, DP, w.k);
      multiply<BLOCK_KEYS / 16, ROWS / 16>(keys.base, keys.stride, w.q, ROWS, w.s + j * ROWS, ROWS, DP / 2, false);
    }
    float unit = a.scale;
    if (!(unit > 0.0f)) {   // makes the unit positive, so that the largest score has the largest weight
      for (int i = 0; i < count * ROWS; i += LANES) store(w.s + i, load(w.s + i) * a.scale);
      unit = 1.0f;
    }
    for (int g = 0; g < count / GROUP_COLUMNS; ++g)
      if (w.masks[g]) apply_mask(w.masks[g], -INF, w.s + g * GROUP_COLUMNS * ROWS);
    weigh_chunk(w, tile, count, {unit * LOG2E});
    for (int r = 0; r < ROWS && !first; ++r)
      for (int d = 0; d < DP; d += LANES) store(tile.out + r * DP + d, load(tile.out + r * DP + d) * w.alpha[r]);
    const uint32_t* values = head.values(v, w.tokens, count, a.head_dim, w.v);
    multiply<ROWS / 16, DP / 16>(w.p, CHUNK_KEYS, values, DP, tile.out, DP, count / 2, !first);
  }

  void add_item(const Plan& plan, const Plan::Item& item) const {
    pack_columns<DP>(q, plan.rows(item.tile), a.head_dim, w.q);
    tile.clear_softmax();
    int count = 0;
    bool first = true;
    for_each_group(plan, AbsentText(), item.begin, item.end, [&](const int32_t* tokens, const uint32_t* mask) {
      std::memcpy(w.tokens + count, tokens, sizeof(int32_t) * GROUP_COLUMNS);
      w.masks[count / GROUP_COLUMNS] = mask;
      count += GROUP_COLUMNS;
      if (count == CHUNK_KEYS) {
        add_chunk(count, first);
        count = 0;
        first = false;
      }
    });
    if (count) add_chunk(count, first);
  }

  static SparseAttentionSpace space(const SparseAttentionArgs& a) {
    return {PackedHead<DP>::floats(a.n), sizeof(TileState<DP>) / sizeof(float),
            (sizeof(ForwardSpace<DP>) + 63) / 64 * 16};
  }

  static void attend(const SparseAttentionArgs& a, int64_t bh, const Plan::Item& item, const float* head, float* carry,
                     float* thread) {
    const FlushDenormals guard;
    const MatrixUnit unit;
    const auto rows = [&](const void* p, const Strides& s) {
      return BFloat16Rows{matrix_of<BFloat16>(p, s, a.heads, bh), s.token};
    };
    const AttentionForward forward = {a,
                                      rows(a.q, a.q_strides),
                                      rows(a.v, a.v_strides),
                                      PackedHead<DP>(a.n, head),
                                      *reinterpret_cast<ForwardSpace<DP>*>(thread),
                                      *reinterpret_cast<TileState<DP>*>(carry)};
    forward.add_item(Plan(a.plan), item);
  }

  static void merge(TileState<DP>& tile, const TileState<DP>& other, float unit) {
    alignas(64) float alpha[ROWS], beta[ROWS];
    tile.merge_softmax(other, unit, alpha, beta);
    for (int r = 0; r < ROWS; ++r)
      for (int d = 0; d < DP; d += LANES) {
        const int at = r * DP + d;
        store(tile.out + at, load(tile.out + at) * alpha[r] + load(other.out + at) * beta[r]);
      }
  }

  static void finish(const SparseAttentionArgs& a, int64_t bh, int64_t t, float* carry, int64_t items) {
    const FlushDenormals guard;
    const float unit = a.scale > 0.0f ? a.scale : 1.0f;
    TileState<DP>& tile = *reinterpret_cast<TileState<DP>*>(carry);
    for (int64_t i = 1; i < items; ++i) merge(tile, (&tile)[i], unit);
    const int32_t* rows = Plan(a.plan).rows(t);
    BFloat16* out = matrix_of<BFloat16>(a.out, a.out_strides, a.heads, bh);
    float* lse = a.lse + bh * a.n;
    for (int r = 0; r < ROWS; ++r) {
      if (rows[r] < 0) continue;
      round_row<DP>(tile.out + r * DP, 1.0f / tile.sum[r], a.head_dim, out + rows[r] * a.out_strides.token);
      lse[rows[r]] = tile.log_sum_exp(r, unit);
    }
  }

  static SparseAttentionKernel call() { return {space, PackedHead<DP>::prepare, attend, finish}; }
};

}   // namespace

SparseAttentionKernel sparse_attention(const SparseAttentionArgs& a) {
  const bool here = a.dtype == DType::bfloat16 && !a.has_options();
  return here ? dispatch_dim<AttentionForward>(a.head_dim) : avx512::sparse_attention(a);
}

}   // namespace dk::DK_ISA
