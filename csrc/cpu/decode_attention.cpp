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
  const float *keys[KEYS], *values[KEYS];
};

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

// Lets the last block of rows be read whole: repeats the first row behind the last.
DK_INLINE void pad(const float** rows, int count) {
  for (; count % PADDED; ++count) rows[count] = rows[0];
}

// What was stored is what is loaded, rounded: keeps the compiler from fusing a product and a later sum in one of the two ways only.
DK_INLINE void settle() { asm volatile("" ::: "memory"); }

// -- one sequence

// s[j] = scale * sum_d q[d] * keys[j][d], added up in the order of products(); -inf up to the next whole vector
template <int DP> DK_INLINE void products_of_one(const float* q, const float* const* keys, int count, float scale, float* s) {
  for (int j = 0; j < count; j += LANES) {
    Vec total{};
    for (int from = 0; from < DP; from += SPAN<DP>) {
      Vec even{}, odd{};
      for (int d = from; d < from + SPAN<DP>; d += LANES) {
        Vec block[LANES];
        DK_UNROLL for (int i = 0; i < LANES; ++i) block[i] = load(keys[j + i] + d);
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
  for (int j = count; j % LANES; ++j) s[j] = -INF;
}

// out[d] = sum_j w[j] * values[j][d], in the order of accumulate()
template <int DP> DK_INLINE void accumulate_of_one(const float* w, const float* const* values, int count, float* out) {
  constexpr int VECS = DP / LANES < 8 ? DP / LANES : 8;
  for (int d = 0; d < DP; d += VECS * LANES) {
    Vec acc[VECS] = {};
    for (int j = 0; j < count; ++j) {
      const float* value = values[j] + d;
      DK_UNROLL for (int i = 0; i < VECS; ++i) acc[i] += load(value + i * LANES) * w[j];
    }
    DK_UNROLL for (int i = 0; i < VECS; ++i) store(out + d + i * LANES, acc[i]);
  }
}

// Takes `count` keys into the state of a sequence.
template <int DP> DK_INLINE void absorb_for_one(DecodeSpace<DP>& w, int count, float scale, State<DP>& state) {
  float* s = w.s;
  products_of_one<DP>(w.q, w.keys, count, scale, s);
  settle();
  Vec top = splat(state.max), sum{};
  for (int j = 0; j < count; j += LANES) top = max(top, load(s + j));
  const float new_max = reduce_max(top);
  for (int j = 0; j < count; j += LANES) {
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
  accumulate_of_one<DP>(s, w.values, count, w.added);
  settle();
  for (int d = 0; d < DP; d += LANES) store(state.out + d, load(state.out + d) + load(w.added + d));
}

// -- a panel: all candidates of the call see the same keys

template <int DP> DK_INLINE void absorb_for_panel(DecodeSpace<DP>& w, int count, float scale) {
  for (int j = 0; j < count; j += GROUP_COLUMNS) products<DP>(w.qt, w.keys + j, scale, w.s + j * ROWS);
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
  accumulate<DP>(w.s, w.values, count, w.added);
  for (int i = 0; i < DP * ROWS; i += LANES) store(w.ot + i, load(w.ot + i) + load(w.added + i));
}

template <class T, int DP> struct Decode {
  static constexpr int64_t SPACE = (sizeof(DecodeSpace<DP>) + 3) / 4;
  static constexpr bool is_float = sizeof(T) == 4;

  static int64_t copy_floats(const DecodeAttentionArgs& a) {   // of the text's keys, or values
    return is_float && a.head_dim == DP ? 0 : DecodeSchedule(a.schedule)[DecodeSchedule::TEXT_LEN] * DP;
  }

  // Text keys for candidates [begin, end): panel or one by one; leaves their states in w.states.
  static void text(const DecodeAttentionArgs& a, DecodeSchedule::Runs runs, const T* q, int count, FloatRows k, FloatRows v, DecodeSpace<DP>& w) {
    const auto gather = [&](const int32_t* places, int n) {
      for (int j = 0; j < n; ++j) {
        w.keys[j] = k.row(places[j]);
        w.values[j] = v.row(places[j]);
      }
      pad(w.keys, n);
    };
    for (int c = 0; c < count; ++c) {
      std::memset(w.states[c].out, 0, sizeof(w.states[c].out));
      w.states[c].max = LOWEST, w.states[c].sum = 0.0f;
    }
    if (count < FEWEST_OF_PANEL) {
      for_each_chunk(runs, [&](const int32_t* places, int n) {
        gather(places, n);
        for (int c = 0; c < count; ++c) {
          fetch_row<T, DP>(q, a.q_strides.sequence, c, a.head_dim, w.q);
          absorb_for_one<DP>(w, n, a.scale, w.states[c]);
        }
      });
      return;
    }
    int32_t lanes[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      lanes[r] = r < count ? r : -1;
      w.max[r] = LOWEST, w.sum[r] = 0.0f;
    }
    pack_transposed<T, DP>(q, a.q_strides.sequence, lanes, a.head_dim, w.qt);
    std::memset(w.ot, 0, sizeof(w.ot));
    for_each_chunk(runs, [&](const int32_t* places, int n) {
      gather(places, n);
      absorb_for_panel<DP>(w, n, a.scale);
    });
    for (int c = 0; c < count; ++c) {
      for (int d = 0; d < DP; ++d) w.states[c].out[d] = w.ot[d * ROWS + c];
      w.states[c].max = w.max[c], w.states[c].sum = w.sum[c];
    }
  }


  static const float* image_row(const T* row, int64_t head_dim, float* copy) {
    if (is_float && head_dim == DP) return reinterpret_cast<const float*>(row);
    fetch_row<T, DP>(row, 0, 0, head_dim, copy);
    return copy;
  }

  static void prefetch(const T* row, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
  }

  // Image keys for one sequence, on top of what is in `state`. The rows of the next sequence, `next` elements away, are fetched meanwhile.
  static void image(const DecodeAttentionArgs& a, DecodeSchedule::Runs runs, const T* k, const T* v, int64_t next, DecodeSpace<DP>& w, State<DP>& state) {
    const int64_t dim = a.head_dim;
    for_each_chunk(runs, [&](const int32_t* places, int n) {
      for (int j = 0; j < n; ++j) {
        const T *key = k + places[j] * dim, *value = v + places[j] * dim;
        w.keys[j] = image_row(key, dim, w.key_copies + j * DP);
        w.values[j] = image_row(value, dim, w.value_copies + j * DP);
        prefetch(key + next, dim);
        prefetch(value + next, dim);
      }
      pad(w.keys, n);
      absorb_for_one<DP>(w, n, a.scale, state);
    });
  }

  static void call(const DecodeAttentionArgs& a, float* workspace, int64_t prompt, int64_t head, int64_t begin, int64_t end) {
    const FlushDenormals guard;
    const DecodeSchedule schedule(a.schedule);
    const int64_t dim = a.head_dim, text_len = schedule[DecodeSchedule::TEXT_LEN], own = schedule.slot(*a.step) * dim;
    const int64_t first = prompt * a.candidates + begin, count = end - begin;
    const auto offset = [&](SequenceStrides s) { return first * s.sequence + head * s.head; };
    const T* q = static_cast<const T*>(a.q) + offset(a.q_strides);
    const T *new_k = static_cast<const T*>(a.k) + offset(a.k_strides), *new_v = static_cast<const T*>(a.v) + offset(a.v_strides);
    T *image_k = static_cast<T*>(a.image_k) + offset(a.image_strides), *image_v = static_cast<T*>(a.image_v) + offset(a.image_strides);
    T* out = static_cast<T*>(a.out) + (first * a.heads + head) * dim;
    auto& w = *reinterpret_cast<DecodeSpace<DP>*>(workspace);

    float* copy = workspace + SPACE;
    const int64_t prefix = (prompt * a.heads + head) * text_len * dim;
    const FloatRows k = float_rows<T, DP>(static_cast<const T*>(a.prefix_k) + prefix, dim, text_len, dim, copy);
    const FloatRows v = float_rows<T, DP>(static_cast<const T*>(a.prefix_v) + prefix, dim, text_len, dim, copy + copy_floats(a));
    text(a, schedule.text(*a.step), q, count, k, v, w);

    for (int64_t c = 0; c < count; ++c) {
      State<DP>& state = w.states[c];
      T *keys = image_k + c * a.image_strides.sequence, *values = image_v + c * a.image_strides.sequence;
      std::memcpy(keys + own, new_k + c * a.k_strides.sequence, dim * sizeof(T));
      std::memcpy(values + own, new_v + c * a.v_strides.sequence, dim * sizeof(T));
      fetch_row<T, DP>(q, a.q_strides.sequence, c, dim, w.q);
      image(a, schedule.image(*a.step), keys, values, c + 1 < count ? a.image_strides.sequence : 0, w, state);
      const float divide = 1.0f / state.sum;
      for (int d = 0; d < DP; d += LANES) store(state.out + d, load(state.out + d) * divide);
      store_row(state.out, out + c * a.heads * dim, dim);
    }
  }
};

template <class T, int DP> struct DecodeWorkspace {
  static int64_t call(const DecodeAttentionArgs& a) { return Decode<T, DP>::SPACE + 2 * Decode<T, DP>::copy_floats(a); }
};

static int64_t workspace(const DecodeAttentionArgs& a) { return dispatch<DecodeWorkspace>(a.dtype, a.head_dim, a); }
static void run(const DecodeAttentionArgs& a, float* workspace, int64_t prompt, int64_t head, int64_t begin, int64_t end) {
  dispatch<Decode>(a.dtype, a.head_dim, a, workspace, prompt, head, begin, end);
}

extern const DecodeAttentionKernel decode_attention;
const DecodeAttentionKernel decode_attention = {workspace, run};

}  // namespace dk::DK_ISA
