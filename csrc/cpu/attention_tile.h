// Building blocks of attention over one tile of 32 queries. Lanes are queries; keys and values are broadcast from their
// rows, so that gathering is free and only Q and O are transposed.
#pragma once
#include "common/plan.h"
#include "cpu/philox.h"
#include "cpu/softmax.h"
#include "cpu/sparse_attention.h"
#include "cpu/vec.h"

namespace dk::DK_ISA {

constexpr int ROWS = TILE_ROWS;
constexpr int PAIR = 2 * LANES;   // queries per register block
// keys (or head dims) per register block: BLOCK x 2 accumulators fit the register file
constexpr int BLOCK = LANES == 16 ? 8 : 4;
constexpr int CHUNK_KEYS = 128;   // keys per update of the softmax

// Row `token` of a [N, D] matrix of T, as floats zero-padded to DP.
template <class T, int DP>
DK_INLINE void fetch_row(const T* base, int64_t stride, int32_t token, int head_dim, float* out) {
  load_row(base + token * stride, out, head_dim);
  for (int d = head_dim; d < DP; ++d) out[d] = 0.0f;
}

// out[j][i] = in[i][j] for LANES rows of `columns`, a multiple of LANES
DK_INLINE void transpose_rows(const float* in, int64_t in_stride, int columns, float* out, int64_t out_stride) {
  for (int j = 0; j < columns; j += LANES) {
    Vec v[LANES];
    DK_UNROLL_FOR (int i = 0; i < LANES; ++i) v[i] = load(in + i * in_stride + j);
    transpose(v);
    DK_UNROLL_FOR (int i = 0; i < LANES; ++i) store(out + (j + i) * out_stride, v[i]);
  }
}

// LANES rows of a tile as floats, [LANES][DP]; padding rows are zero.
template <class T, int DP>
DK_INLINE void fetch_rows(const T* base, int64_t stride, const int32_t* rows, int head_dim, float* out) {
  for (int i = 0; i < LANES; ++i) {
    if (rows[i] >= 0) fetch_row<T, DP>(base, stride, rows[i], head_dim, out + i * DP);
    else std::memset(out + i * DP, 0, DP * sizeof(float));
  }
}

// The rows of a tile, transposed to [DP][ROWS]; padding rows are zero.
template <class T, int DP>
DK_INLINE void pack_transposed(const T* base, int64_t stride, const int32_t* rows, int head_dim, float* out) {
  float fetched[LANES * DP];
  for (int r = 0; r < ROWS; r += LANES) {
    fetch_rows<T, DP>(base, stride, rows + r, head_dim, fetched);
    transpose_rows(fetched, DP, DP, out + r, ROWS);
  }
}

template <class T, int DP>
DK_INLINE void unpack_transposed(const float* in, const int32_t* rows, int head_dim, float scale, T* base,
                                 int64_t stride) {
  float unpacked[ROWS * DP];
  for (int d = 0; d < DP; d += LANES) transpose_rows(in + d * ROWS, ROWS, ROWS, unpacked + d, DP);
  for (int i = 0; i < ROWS * DP; ++i) unpacked[i] *= scale;
  for (int r = 0; r < ROWS; ++r)
    if (rows[r] >= 0) store_row(unpacked + r * DP, base + rows[r] * stride, head_dim);
}

// Products over the head dim are summed separately over even and odd d, and SPAN at a time: shorter chains have smaller
// rounding errors.
template <int DP> constexpr int SPAN = DP < 64 ? DP : 64;

// out[j][32] = factor * sum_d a[d][32] * keys[j][d] for the GROUP_COLUMNS rows `keys`
template <int DP> DK_INLINE void products(const float* a, const float* const* keys, float factor, float* out) {
  constexpr int AT_ONCE = BLOCK / 2;
  for (int r = 0; r < ROWS; r += PAIR)
    for (int j = 0; j < GROUP_COLUMNS; j += AT_ONCE)
      for (int from = 0; from < DP; from += SPAN<DP>) {
        Vec even[AT_ONCE][2] = {}, odd[AT_ONCE][2] = {};
        for (int d = from; d < from + SPAN<DP>; d += 2) {
          const float* x = a + d * ROWS + r;
          const Vec even0 = load(x), even1 = load(x + LANES), odd0 = load(x + ROWS), odd1 = load(x + ROWS + LANES);
          DK_UNROLL_FOR (int i = 0; i < AT_ONCE; ++i) {
            const float key0 = keys[j + i][d], key1 = keys[j + i][d + 1];
            even[i][0] += even0 * key0;
            even[i][1] += even1 * key0;
            odd[i][0] += odd0 * key1;
            odd[i][1] += odd1 * key1;
          }
        }
        DK_UNROLL_FOR (int i = 0; i < AT_ONCE; ++i)
          DK_UNROLL_FOR (int half = 0; half < 2; ++half) {
            float* o = out + (j + i) * ROWS + r + half * LANES;
            Vec sum = even[i][half] + odd[i][half];
            if (from) sum = load(o) + sum;
            store(o, from + SPAN<DP> < DP ? sum : sum * factor);
          }
      }
}

// s[j][32] = fill for queries without a bit in the mask of key j
DK_INLINE void apply_mask(const uint32_t* mask, float fill, float* s) {
  for (int j = 0; j < GROUP_COLUMNS; ++j)
    for (int r = 0; r < ROWS; r += LANES)
      store(s + j * ROWS + r, select(mask[j] >> r, load(s + j * ROWS + r), splat(fill)));
}

// out[d][32] += sum_j w[j][32] * values[j][d], j < count
template <int DP> DK_INLINE void accumulate(const float* w, const float* const* values, int count, float* out) {
  for (int r = 0; r < ROWS; r += PAIR)
    for (int d = 0; d < DP; d += BLOCK) {
      Vec acc[BLOCK][2];
      DK_UNROLL_FOR (int i = 0; i < BLOCK; ++i) {
        acc[i][0] = load(out + (d + i) * ROWS + r);
        acc[i][1] = load(out + (d + i) * ROWS + r + LANES);
      }
      for (int j = 0; j < count; ++j) {
        const Vec w0 = load(w + j * ROWS + r), w1 = load(w + j * ROWS + r + LANES);
        const float* value = values[j] + d;
        DK_UNROLL_FOR (int i = 0; i < BLOCK; ++i) {
          acc[i][0] += w0 * value[i];
          acc[i][1] += w1 * value[i];
        }
      }
      DK_UNROLL_FOR (int i = 0; i < BLOCK; ++i) {
        store(out + (d + i) * ROWS + r, acc[i][0]);
        store(out + (d + i) * ROWS + r + LANES, acc[i][1]);
      }
    }
}

// Rows of DP floats
struct FloatRows {
  const float* base;
  int64_t stride;
  const float* row(int32_t token) const { return base + token * stride; }
};

// The matrix of one (batch, head); of K or V if `group` heads share one
template <class T>
DK_INLINE const T* matrix_of(const void* p, const Strides& s, int64_t heads, int64_t bh, int64_t group = 1) {
  return static_cast<const T*>(p) + bh / heads * s.batch + bh % heads / group * s.head;
}
template <class T> DK_INLINE T* matrix_of(void* p, const Strides& s, int64_t heads, int64_t bh, int64_t group = 1) {
  return static_cast<T*>(p) + bh / heads * s.batch + bh % heads / group * s.head;
}

// K and V of one (batch, head) as rows of DP floats: the tensors themselves if they are float and need no padding, else
// a converted copy of `floats` floats, which `prepare` fills in parts.
template <class T, int DP> struct FloatHead {
  static bool in_place(const SparseAttentionArgs& a) { return sizeof(T) == sizeof(float) && a.head_dim == DP; }
  static int64_t floats(const SparseAttentionArgs& a) { return in_place(a) ? 0 : 2 * a.n * DP; }

  static void prepare(const SparseAttentionArgs& a, int64_t bh, int64_t part, int64_t parts, float* copy) {
    if (in_place(a)) return;
    const T *k = matrix_of<T>(a.k, a.k_strides, a.heads, bh, a.group),
            *v = matrix_of<T>(a.v, a.v_strides, a.heads, bh, a.group);
    for (int64_t i = a.n * part / parts; i < a.n * (part + 1) / parts; ++i) {
      fetch_row<T, DP>(k, a.k_strides.token, i, a.head_dim, copy + i * DP);
      fetch_row<T, DP>(v, a.v_strides.token, i, a.head_dim, copy + (a.n + i) * DP);
    }
  }

  FloatHead(const SparseAttentionArgs& a, int64_t bh, const float* copy) : k{copy, DP}, v{copy + a.n * DP, DP} {
    if (!in_place(a)) return;
    k = {matrix_of<float>(a.k, a.k_strides, a.heads, bh, a.group), a.k_strides.token};
    v = {matrix_of<float>(a.v, a.v_strides, a.heads, bh, a.group), a.v_strides.token};
  }
  FloatRows k, v;
};

// The text that a sequence lacks: tokens [begin, end), which are hidden as keys, and as queries have results of 0.
struct AbsentText {
  AbsentText() = default;   // none
  explicit AbsentText(const SparseAttentionArgs& a, int64_t bh) {
    if (!a.text_lengths) return;
    begin = static_cast<int32_t>(a.text_lengths[bh / a.heads]);
    end = Plan(a.plan)[plan_header::text_len];
  }
  bool has(int32_t token) const { return begin <= token && token < end; }

  // Hides keys of a group: their mask is empty, and they repeat another key. Returns false if all keys are hidden.
  bool hide(int32_t* tokens, const uint32_t*& mask, uint32_t* own_mask) const {
    int shown = 0;
    while (shown < GROUP_COLUMNS && has(tokens[shown])) ++shown;
    if (shown == GROUP_COLUMNS) return false;
    const int32_t other = tokens[shown];
    for (int j = 0; j < GROUP_COLUMNS; ++j) {
      own_mask[j] = has(tokens[j]) ? 0 : mask ? mask[j] : ~0u;
      if (has(tokens[j])) tokens[j] = other;
    }
    mask = own_mask;
    return true;
  }

  // A tile's rows, with padding in place of absent ones
  void present(const int32_t* rows, int32_t* out) const {
    for (int r = 0; r < ROWS; ++r) out[r] = has(rows[r]) ? -1 : rows[r];
  }

  int32_t begin = 0, end = 0;
};

// Calls visit(tokens[GROUP_COLUMNS], mask or nullptr) for every key group of the entries [begin, end). Padding repeats
// the group's first key.
template <class Visit>
DK_INLINE void for_each_group(const Plan& plan, const AbsentText& absent, int64_t begin, int64_t end,
                              const Visit& visit) {
  int32_t tokens[GROUP_COLUMNS];
  uint32_t own_mask[GROUP_COLUMNS];
  for (int64_t e = begin; e < end; ++e) {
    const Plan::Entry entry = plan.entry(e);
    for (int32_t g = 0; g < entry.groups; ++g) {
      if (entry.keys >= 0) {
        for (int j = 0; j < GROUP_COLUMNS; ++j) tokens[j] = entry.keys + g * GROUP_COLUMNS + j;
      } else {
        const int32_t* gather = plan.gather(~entry.keys + g);
        for (int j = 0; j < GROUP_COLUMNS; ++j) tokens[j] = gather[j] >= 0 ? gather[j] : gather[0];
      }
      const uint32_t* mask = entry.mask >= 0 ? plan.mask(entry.mask + g) : nullptr;
      if (absent.begin == absent.end || absent.hide(tokens, mask, own_mask)) visit(tokens, mask);
    }
  }
}

// The same for all entries of a tile.
template <class Visit>
DK_INLINE void for_each_group(const Plan& plan, const AbsentText& absent, int64_t tile, const Visit& visit) {
  for_each_group(plan, absent, plan.begin(tile), plan.begin(tile + 1), visit);
}

// Dropout of one (batch, head). The random bits of a pair are those of index query * 2^32 + key at the head's offset.
struct Dropout {
  explicit Dropout(const SparseAttentionArgs& a, int64_t bh) : active(a.seeds != nullptr), threshold(a.threshold) {
    if (active)
      key = {static_cast<uint64_t>(a.seeds[bh / a.heads]), static_cast<uint64_t>(a.head_offset + bh % a.heads)};
  }

  // kept[j]: one bit per row, set if the pair of the row and key j is kept. Nothing without dropout.
  void draw(const int32_t* rows, const int32_t* tokens, uint32_t* kept) const {
    if (!active) return;
    uint32_t of_block[4];
    for (int j = 0; j < GROUP_COLUMNS; ++j) {
      if (j == 0 || tokens[j] / 4 != tokens[j - 1] / 4)
        kept_of_block<ROWS>(key, rows, tokens[j] / 4, threshold, of_block);
      kept[j] = of_block[tokens[j] % 4];
    }
  }

  // w[j][32] = w[j][32] * factor, or 0 where the pair is dropped. Nothing without dropout.
  void apply(const uint32_t* kept, int count, float factor, float* w) const {
    if (!active) return;
    for (int j = 0; j < count; ++j)
      for (int r = 0; r < ROWS; r += LANES)
        store(w + j * ROWS + r, select(kept[j] >> r, load(w + j * ROWS + r) * factor, Vec{}));
  }

  bool active;
  uint32_t threshold;
  PhiloxKey key{};
};

// Online-softmax state of a tile's queries over some of their keys. The layout of the unnormalised output is the
// kernel's own.
template <int DP> struct TileState {
  alignas(64) float out[DP * ROWS], maximum[ROWS], sum[ROWS];

  // The state of queries [r, r + LANES)
  DK_INLINE SoftmaxState<> at(int r) const { return {load(maximum + r), load(sum + r)}; }
  DK_INLINE void put(int r, const SoftmaxState<>& state) {
    store(maximum + r, state.maximum);
    store(sum + r, state.sum);
  }
  DK_INLINE void clear_softmax() {
    for (int r = 0; r < ROWS; r += LANES) put(r, {});
  }
  // Merges the statistics; the caller merges outputs as out * alpha + other.out * beta. Scores are in units of `unit`.
  DK_INLINE void merge_softmax(const TileState& other, float unit, float* alpha, float* beta) {
    for (int r = 0; r < ROWS; r += LANES) {
      SoftmaxState<> state = at(r);
      const auto factors = state.merge(other.at(r), Exp{unit});
      put(r, state);
      store(alpha + r, factors.own);
      store(beta + r, factors.other);
    }
  }
  float log_sum_exp(int r, float unit) const { return static_cast<float>(maximum[r] * unit + __builtin_log(sum[r])); }
};

// Selects the kernel instance for an element type and the smallest padded head dim.
template <template <class, int> class Instance, class... A>
DK_INLINE auto dispatch(DType dtype, int64_t head_dim, A&&... a) {
  auto by_dim = [&](auto element) {
    using T = decltype(element);
    if (head_dim <= 32) return Instance<T, 32>::call(a...);
    if (head_dim <= 64) return Instance<T, 64>::call(a...);
    return Instance<T, 128>::call(a...);
  };
  if (dtype == DType::float32) return by_dim(float{});
  if (dtype == DType::bfloat16) return by_dim(BFloat16{});
  return by_dim(Float16{});
}

}   // namespace dk::DK_ISA
