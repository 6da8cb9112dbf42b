// Forward in bfloat16: for every work item, softmax of 32 queries over the keys that the plan lists, online over chunks of keys. Other types go to avx512's
// kernel.
#include "cpu/attention_tile_bf16.h"

namespace dk::avx512 {
SparseAttentionKernel sparse_attention(const SparseAttentionArgs&);
}

namespace dk::DK_ISA {

// Keys and values of one (batch, head), prepared for all its tiles: K padded to DP, and V as pairs of neighbouring rows, [n / 2][DP].
template <int DP> struct PackedHead {
  static int64_t floats(int64_t n) { return (n + 1) / 2 * 2 * DP; }

  PackedHead(int64_t n, const float* head) : PackedHead(n, const_cast<float*>(head)) {}
  PackedHead(int64_t n, float* head) : k(reinterpret_cast<BFloat16*>(head)), v(reinterpret_cast<uint32_t*>(head + (n + 1) / 2 * DP)) {}

  static void prepare(const SparseAttentionArgs& a, int64_t bh, int64_t part, int64_t parts, float* head) {
    const Rows k{matrix_of<BFloat16>(a.k, a.k_strides, a.heads, bh), a.k_strides.token}, v{matrix_of<BFloat16>(a.v, a.v_strides, a.heads, bh), a.v_strides.token};
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

  // Rows of values as pairs: as they lie where `tokens` are neighbours, else packed into `copy`.
  const uint32_t* values(Rows rows, const int32_t* tokens, int count, int head_dim, uint32_t* copy) const {
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
  alignas(64) uint32_t q[DP / 2 * ROWS], v[CHUNK / 2 * DP];   // pairs
  alignas(64) BFloat16 k[KEYS * DP], p[ROWS * CHUNK];
  alignas(64) float s[CHUNK * ROWS], keep[ROWS];
  int32_t tokens[CHUNK];
  const uint32_t* masks[CHUNK / GROUP_COLUMNS];
};
constexpr uint32_t HIDDEN[GROUP_COLUMNS] = {};

// From the chunk's scores, in units of 2^unit, to weights p[query][key]; updates the softmax statistics.
template <int DP> DK_INLINE void weigh(ForwardSpace<DP>& w, Partial<DP>& to, int count, float unit) {
  for (int r = 0; r < ROWS; r += LANES) {
    const float* s = w.s + r;
    const Vec old_max = load(to.max + r);
    Vec new_max = old_max, sum{};
    for (int j = 0; j < count; ++j) new_max = max(new_max, load(s + j * ROWS));
    for (int j = 0; j < count; j += KEYS) {
      Vec pairs[LANES];
      DK_UNROLL for (int i = 0; i < LANES; ++i) {
        const Vec first = exp2_coarse((load(s + (j + 2 * i) * ROWS) - new_max) * unit);
        const Vec second = exp2_coarse((load(s + (j + 2 * i + 1) * ROWS) - new_max) * unit);
        sum += first + second;
        pairs[i] = pair_up(first, second);
      }
      transpose(pairs);
      DK_UNROLL for (int i = 0; i < LANES; ++i) store(reinterpret_cast<float*>(w.p + (r + i) * CHUNK + j), pairs[i]);
    }
    const Vec keep = exp2_coarse((old_max - new_max) * unit);
    store(to.max + r, new_max);
    store(to.sum + r, load(to.sum + r) * keep + sum);
    store(w.keep + r, keep);
  }
}

template <int DP> struct Forward {
  const SparseAttentionArgs& a;
  const Rows q, v;
  const PackedHead<DP> head;
  ForwardSpace<DP>& w;
  Partial<DP>& to;

  // Fills the chunk up with hidden keys, so that products are whole.
  int fill(int count) const {
    for (; count % KEYS; count += GROUP_COLUMNS) {
      for (int j = 0; j < GROUP_COLUMNS; ++j) w.tokens[count + j] = w.tokens[count - 1];
      w.masks[count / GROUP_COLUMNS] = HIDDEN;
    }
    return count;
  }

  // Adds a chunk of keys.
  void absorb(int count, bool first) const {
    count = fill(count);
    for (int j = 0; j < count; j += KEYS) {
      const Rows keys = left_rows<DP>({head.k, DP}, w.tokens + j, DP, w.k);
      multiply<KEYS / 16, ROWS / 16>(keys.base, keys.stride, w.q, ROWS, w.s + j * ROWS, ROWS, DP / 2, false);
    }
    float unit = a.scale;
    if (!(unit > 0.0f)) {   // so that the largest score has the largest weight
      for (int i = 0; i < count * ROWS; i += LANES) store(w.s + i, load(w.s + i) * a.scale);
      unit = 1.0f;
    }
    for (int g = 0; g < count / GROUP_COLUMNS; ++g)
      if (w.masks[g]) apply_mask(w.masks[g], -INF, w.s + g * GROUP_COLUMNS * ROWS);
    weigh(w, to, count, unit * static_cast<float>(LOG2E));
    for (int r = 0; r < ROWS && !first; ++r)
      for (int d = 0; d < DP; d += LANES) store(to.o + r * DP + d, load(to.o + r * DP + d) * w.keep[r]);
    const uint32_t* values = head.values(v, w.tokens, count, a.head_dim, w.v);
    multiply<ROWS / 16, DP / 16>(w.p, CHUNK, values, DP, to.o, DP, count / 2, !first);
  }

  void absorb_item(const Plan& plan, const Plan::Item& item) const {
    pack_columns<DP>(q, plan.rows(item.tile), a.head_dim, w.q);
    for (int r = 0; r < ROWS; r += LANES) {
      store(to.max + r, splat(LOWEST));
      store(to.sum + r, Vec{});
    }
    int count = 0;
    bool first = true;
    for_each_group(plan, item.begin, item.end, [&](const int32_t* tokens, const uint32_t* mask) {
      std::memcpy(w.tokens + count, tokens, sizeof(int32_t) * GROUP_COLUMNS);
      w.masks[count / GROUP_COLUMNS] = mask;
      count += GROUP_COLUMNS;
      if (count == CHUNK) {
        absorb(count, first);
        count = 0;
        first = false;
      }
    });
    if (count) absorb(count, first);
  }

  static SparseAttentionSpace space(const SparseAttentionArgs& a) {
    return {PackedHead<DP>::floats(a.n), sizeof(Partial<DP>) / sizeof(float), (sizeof(ForwardSpace<DP>) + 63) / 64 * 16};
  }

  static void attend(const SparseAttentionArgs& a, int64_t bh, const Plan::Item& item, const float* head, float* left, float* thread) {
    const FlushDenormals guard;
    const MatrixUnit unit;
    const auto rows = [&](const void* p, const Strides& s) { return Rows{matrix_of<BFloat16>(p, s, a.heads, bh), s.token}; };
    const Forward forward = {a, rows(a.q, a.q_strides), rows(a.v, a.v_strides), PackedHead<DP>(a.n, head), *reinterpret_cast<ForwardSpace<DP>*>(thread),
                             *reinterpret_cast<Partial<DP>*>(left)};
    forward.absorb_item(Plan(a.plan), item);
  }

  static void join(Partial<DP>& to, const Partial<DP>& from, float unit) {
    alignas(64) float keep[ROWS], add[ROWS];
    join_statistics(to, from, unit, keep, add);
    for (int r = 0; r < ROWS; ++r)
      for (int d = 0; d < DP; d += LANES) {
        const int at = r * DP + d;
        store(to.o + at, load(to.o + at) * keep[r] + load(from.o + at) * add[r]);
      }
  }

  static void finish(const SparseAttentionArgs& a, int64_t bh, int64_t t, float* left, int64_t items) {
    const FlushDenormals guard;
    const float unit = a.scale > 0.0f ? a.scale : 1.0f;
    Partial<DP>& tile = *reinterpret_cast<Partial<DP>*>(left);
    for (int64_t i = 1; i < items; ++i) join(tile, (&tile)[i], unit);
    const int32_t* rows = Plan(a.plan).rows(t);
    BFloat16* out = matrix_of<BFloat16>(a.out, a.out_strides, a.heads, bh);
    float* lse = a.lse + bh * a.n;
    for (int r = 0; r < ROWS; ++r) {
      if (rows[r] < 0) continue;
      round_row<DP>(tile.o + r * DP, 1.0f / tile.sum[r], a.head_dim, out + rows[r] * a.out_strides.token);
      lse[rows[r]] = static_cast<float>(tile.max[r] * unit + __builtin_log(tile.sum[r]));
    }
  }

  static SparseAttentionKernel call() { return {space, PackedHead<DP>::prepare, attend, finish}; }
};

SparseAttentionKernel sparse_attention(const SparseAttentionArgs& a) {
  return a.dtype == DType::bfloat16 ? dispatch_dim<Forward>(a.head_dim) : avx512::sparse_attention(a);
}

}  // namespace dk::DK_ISA
