// One decode step: a prompt's text keys, which its candidates share, then the image keys of each candidate.
// The text is read for all candidates at once (a panel: lanes are candidates) or, where they are few, for each alone (lanes are keys, then head dims).
// Both do the same operations on every number in the same order, so that a result does not depend on how many candidates there are.
#include "cpu/attention_tile.h"
#include "cpu/decode_attention.h"
#include "common/decode_schedule.h"

namespace dk::DK_ISA {

constexpr int FEWEST_OF_PANEL = 5;   // candidates; fewer are faster one by one
constexpr int KEYS = 64;             // between two rescalings, and added up in one chain: longer chains err more
constexpr int PADDED = LANES > GROUP_COLUMNS ? LANES : GROUP_COLUMNS;   // keys are read in blocks of LANES or GROUP_COLUMNS

// What the softmax over some of a sequence's keys has come to: `out` is the values' sum, weighted but not yet divided by `sum`.
template <int DP> struct State {
  alignas(64) float out[DP];
  float max, sum;
};

template <int DP> struct DecodeSpace {
  alignas(64) float qt[DP * ROWS], ot[DP * ROWS], added[DP * ROWS], s[KEYS * ROWS], max[ROWS], sum[ROWS];
  alignas(64) float q[DP], key_copies[KEYS * DP], value_copies[KEYS * DP];
  State<DP> states[ROWS];
};

// `count` rows of a head's keys and values, and behind the last as many more as make whole blocks.
template <class T> struct Rows {
  const T *keys[KEYS], *values[KEYS];
  int count;
  int64_t ahead;   // in elements: when a row is read, the one that far behind it is fetched into the cache
};

// Into the second cache: a core can wait for more lines there than in the first, which has no room for two sequences anyway.
DK_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Calls absorb(places, count <= KEYS) until all places of the runs have been seen.
template <class Absorb> DK_INLINE void for_each_chunk(DecodeSchedule::Runs runs, const Absorb& absorb) {
  int32_t places[KEYS];
  int count = 0;
  for (int32_t i = 0; i < runs.count; ++i) {
    const int32_t begin = runs.pairs[2 * i], end = begin + runs.pairs[2 * i + 1];
    for (int32_t place = begin; place < end; ++place) {
      places[count++] = place;
      if (count == KEYS) {
        absorb(places, count);
        count = 0;
      }
    }
  }
  if (count) absorb(places, count);
}

// What was stored is what is loaded, rounded: keeps the compiler from fusing a product and a later sum in one of the two ways only.
DK_INLINE void settle() { asm volatile("" ::: "memory"); }

// -- one sequence

// s[j] = scale * sum_d q[d] * keys[j][d], added up in the order of products(), as a panel's are; -inf up to the next whole vector
template <class T, int DP> DK_INLINE void products_of_one(const float* q, const Rows<T>& rows, float scale, float* s) {
  for (int j = 0; j < rows.count; j += LANES) {
    Vec total{};
    for (int from = 0; from < DP; from += SPAN<DP>) {
      Vec even{}, odd{};
      for (int d = from; d < from + SPAN<DP>; d += LANES) {
        Vec block[LANES];
        DK_UNROLL for (int i = 0; i < LANES; ++i) {
          block[i] = load(rows.keys[j + i] + d);
          prefetch(rows.keys[j + i] + d + rows.ahead);
        }
        transpose(block);
        DK_UNROLL for (int i = 0; i < LANES; i += 2) {
          even += block[i] * q[d + i];
          odd += block[i + 1] * q[d + i + 1];
        }
      }
      total += even + odd;
    }
    store(s + j, total * scale);
  }
  for (int j = rows.count; j % LANES; ++j) s[j] = -INF;
}

// The same, added up along the head dim, which takes fewer instructions and reads row after row.
template <class T, int DP> DK_INLINE void products_by_row(const float* q, const Rows<T>& rows, float scale, float* s) {
  for (int j = 0; j < rows.count; j += LANES) {
    Vec sums[LANES] = {};
    DK_UNROLL for (int i = 0; i < LANES; ++i)
      for (int d = 0; d < DP; d += LANES) {
        sums[i] += load(rows.keys[j + i] + d) * load(q + d);
        prefetch(rows.keys[j + i] + d + rows.ahead);
      }
    store(s + j, reduce_add_each(sums) * scale);
  }
  for (int j = rows.count; j % LANES; ++j) s[j] = -INF;
}

// out[d] = sum_j w[j] * values[j][d], in the order of accumulate()
template <class T, int DP> DK_INLINE void accumulate_of_one(const float* w, const Rows<T>& rows, float* out) {
  constexpr int VECS = DP / LANES < 8 ? DP / LANES : 8;
  for (int d = 0; d < DP; d += VECS * LANES) {
    Vec acc[VECS] = {};
    for (int j = 0; j < rows.count; ++j) {
      const T* value = rows.values[j] + d;
      DK_UNROLL for (int i = 0; i < VECS; ++i) {
        acc[i] += load(value + i * LANES) * w[j];
        prefetch(value + i * LANES + rows.ahead);
      }
    }
    DK_UNROLL for (int i = 0; i < VECS; ++i) store(out + d + i * LANES, acc[i]);
  }
}

// Takes the rows into the state of a sequence, whose products with them are in w.s.
template <class T, int DP> DK_INLINE void absorb_for_one(DecodeSpace<DP>& w, const Rows<T>& rows, State<DP>& state) {
  float* s = w.s;
  settle();
  Vec top = splat(state.max), sum{};
  for (int j = 0; j < rows.count; j += LANES) top = max(top, load(s + j));
  const float new_max = reduce_max(top);
  for (int j = 0; j < rows.count; j += LANES) {
    const Vec p = exp(load(s + j) - new_max);
    sum += p;
    store(s + j, p);
  }
  const float keep = exp(splat(state.max - new_max))[0];
  state.max = new_max;
  state.sum *= keep;
  for (int d = 0; d < DP; d += LANES) store(state.out + d, load(state.out + d) * keep);
  settle();
  state.sum += reduce_add(sum);
  accumulate_of_one<T, DP>(s, rows, w.added);
  settle();
  for (int d = 0; d < DP; d += LANES) store(state.out + d, load(state.out + d) + load(w.added + d));
}

// -- a panel: all candidates of the call see the same keys

template <int DP> DK_INLINE void absorb_for_panel(DecodeSpace<DP>& w, const Rows<float>& rows, float scale) {
  const int count = rows.count;
  for (int j = 0; j < count; j += GROUP_COLUMNS) products<DP>(w.qt, rows.keys + j, scale, w.s + j * ROWS);
  for (int r = 0; r < ROWS; r += LANES) {
    const Vec old_max = load(w.max + r);
    Vec new_max = old_max, sums[LANES] = {};   // sums[i] is what lane i holds in absorb_for_one
    for (int j = 0; j < count; ++j) new_max = max(new_max, load(w.s + j * ROWS + r));
    for (int j = 0; j < count; ++j) store(w.s + j * ROWS + r, exp(load(w.s + j * ROWS + r) - new_max));
    for (int j = 0; j < count; j += LANES) DK_UNROLL for (int i = 0; i < LANES; ++i) sums[i] += j + i < count ? load(w.s + (j + i) * ROWS + r) : Vec{};
    const Vec keep = exp(old_max - new_max);
    store(w.max + r, new_max);
    store(w.sum + r, load(w.sum + r) * keep);
    for (int d = 0; d < DP; ++d) store(w.ot + d * ROWS + r, load(w.ot + d * ROWS + r) * keep);
    settle();
    store(w.sum + r, load(w.sum + r) + reduce_add(sums));
  }
  std::memset(w.added, 0, sizeof(w.added));
  accumulate<DP>(w.s, rows.values, count, w.added);
  for (int i = 0; i < DP * ROWS; i += LANES) store(w.ot + i, load(w.ot + i) + load(w.added + i));
}

template <class T, int DP> struct Decode {
  using Space = DecodeSpace<DP>;

  // A row of T as a row of DP elements of E: itself where it is one, else a copy.
  template <class E> static const E* row(const T* in, int64_t dim, int64_t ahead, E* copy) {
    if constexpr (sizeof(E) == sizeof(T)) {
      if (dim == DP) return in;
      std::memset(copy, 0, DP * sizeof(E));
      std::memcpy(copy, in, dim * sizeof(E));
    } else {
      fetch_row<T, DP>(in, 0, 0, dim, copy);
    }
    for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) prefetch(in + d + ahead);
    return copy;
  }

  // Calls absorb(Rows<E>) for all rows of the runs; `ahead` elements behind them are those that are read next.
  template <class E, class Absorb>
  static void for_each_rows(DecodeSchedule::Runs runs, const T* k, const T* v, int64_t dim, int64_t ahead, Space& w, const Absorb& absorb) {
    E *key_copies = reinterpret_cast<E*>(w.key_copies), *value_copies = reinterpret_cast<E*>(w.value_copies);
    for_each_chunk(runs, [&](const int32_t* places, int count) {
      Rows<E> rows;
      for (int j = 0; j < count; ++j) {
        rows.keys[j] = row<E>(k + places[j] * dim, dim, ahead, key_copies + j * DP);
        rows.values[j] = row<E>(v + places[j] * dim, dim, ahead, value_copies + j * DP);
      }
      for (int j = count; j % PADDED; ++j) rows.keys[j] = rows.keys[0];   // so that the last block can be read whole
      rows.count = count;
      rows.ahead = dim == DP ? ahead : 0;
      absorb(rows);
    });
  }

  // Text keys for `count` candidates, panel or one by one; leaves their states in w.states.
  static void text(const DecodeAttentionArgs& a, DecodeSchedule::Runs runs, const T* q, int count, const T* k, const T* v, Space& w) {
    const int64_t dim = a.head_dim;
    for (int c = 0; c < count; ++c) {
      std::memset(w.states[c].out, 0, sizeof(w.states[c].out));
      w.states[c].max = LOWEST, w.states[c].sum = 0.0f;
    }
    if (count < FEWEST_OF_PANEL) {
      for_each_rows<T>(runs, k, v, dim, KEYS * dim, w, [&](const Rows<T>& rows) {
        for (int c = 0; c < count; ++c) {
          fetch_row<T, DP>(q, a.q_strides.sequence, c, dim, w.q);
          products_of_one<T, DP>(w.q, rows, a.scale, w.s);
          absorb_for_one<T, DP>(w, rows, w.states[c]);
        }
      });
      return;
    }
    int32_t lanes[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      lanes[r] = r < count ? r : -1;
      w.max[r] = LOWEST, w.sum[r] = 0.0f;
    }
    pack_transposed<T, DP>(q, a.q_strides.sequence, lanes, dim, w.qt);
    std::memset(w.ot, 0, sizeof(w.ot));
    for_each_rows<float>(runs, k, v, dim, 0, w, [&](const Rows<float>& rows) { absorb_for_panel<DP>(w, rows, a.scale); });
    for (int c = 0; c < count; ++c) {
      for (int d = 0; d < DP; ++d) w.states[c].out[d] = w.ot[d * ROWS + c];
      w.states[c].max = w.max[c], w.states[c].sum = w.sum[c];
    }
  }

  static void call(const DecodeAttentionArgs& a, float* workspace, int64_t prompt, int64_t head, int64_t begin, int64_t end) {
    const FlushDenormals guard;
    const DecodeSchedule schedule(a.schedule);
    const int64_t dim = a.head_dim, own = schedule.slot(*a.step) * dim;
    const int64_t first = prompt * a.candidates + begin, count = end - begin;
    const auto offset = [&](SequenceStrides s) { return first * s.sequence + head * s.head; };
    const T* q = static_cast<const T*>(a.q) + offset(a.q_strides);
    const T *new_k = static_cast<const T*>(a.k) + offset(a.k_strides), *new_v = static_cast<const T*>(a.v) + offset(a.v_strides);
    T *image_k = static_cast<T*>(a.image_k) + offset(a.image_strides), *image_v = static_cast<T*>(a.image_v) + offset(a.image_strides);
    T* out = static_cast<T*>(a.out) + (first * a.heads + head) * dim;
    auto& w = *reinterpret_cast<Space*>(workspace);

    const int64_t prefix = (prompt * a.heads + head) * schedule[DecodeSchedule::TEXT_LEN] * dim;
    text(a, schedule.text(*a.step), q, count, static_cast<const T*>(a.prefix_k) + prefix, static_cast<const T*>(a.prefix_v) + prefix, w);

    const int64_t next = a.image_strides.sequence;
    for (int64_t c = 0; c < count; ++c) {
      State<DP>& state = w.states[c];
      T *keys = image_k + c * next, *values = image_v + c * next;
      std::memcpy(keys + own, new_k + c * a.k_strides.sequence, dim * sizeof(T));
      std::memcpy(values + own, new_v + c * a.v_strides.sequence, dim * sizeof(T));
      fetch_row<T, DP>(q, a.q_strides.sequence, c, dim, w.q);
      for_each_rows<T>(schedule.image(*a.step), keys, values, dim, c + 1 < count ? next : 0, w, [&](const Rows<T>& rows) {
        products_by_row<T, DP>(w.q, rows, a.scale, w.s);
        absorb_for_one<T, DP>(w, rows, state);
      });
      const float divide = 1.0f / state.sum;
      for (int d = 0; d < DP; d += LANES) store(state.out + d, load(state.out + d) * divide);
      store_row(state.out, out + c * a.heads * dim, dim);
    }
  }
};

template <class T, int DP> struct DecodeWorkspace {
  static int64_t call() { return (sizeof(DecodeSpace<DP>) + 3) / 4; }
};

static int64_t workspace(const DecodeAttentionArgs& a) { return dispatch<DecodeWorkspace>(a.dtype, a.head_dim); }
static void run(const DecodeAttentionArgs& a, float* workspace, int64_t prompt, int64_t head, int64_t begin, int64_t end) {
  dispatch<Decode>(a.dtype, a.head_dim, a, workspace, prompt, head, begin, end);
}

extern const DecodeAttentionKernel decode_attention;
const DecodeAttentionKernel decode_attention = {workspace, run};

}  // namespace dk::DK_ISA
