// One decode step: a prompt's text keys, which its candidates share, then the image keys of each candidate.
// The text is processed for all candidates at once (a panel: lanes are candidates) or, if they are few, one by one
// (lanes are keys, then head dims). Batch-invariant: both paths perform the same operations in the same order, so a
// result does not depend on the number of candidates.
#include "cpu/decode_attention.h"

#include "common/decode_schedule.h"
#include "cpu/attention_tile.h"

namespace dk::DK_ISA {
namespace {

constexpr int FEWEST_OF_PANEL = 5;   // minimum candidates of a panel; fewer are faster one by one
// keys per update of the softmax, summed in one chain: longer chains have larger rounding errors
constexpr int DECODE_CHUNK_KEYS = 64;
// keys are read in blocks of LANES or GROUP_COLUMNS
constexpr int PADDED = LANES > GROUP_COLUMNS ? LANES : GROUP_COLUMNS;

// Online-softmax state of one sequence: unnormalised output, running maximum and running sum.
template <int DP> struct SequenceState {
  alignas(64) float out[DP];
  float maximum, sum;
};

template <int DP> struct DecodeSpace {
  alignas(64) float qt[DP * ROWS], added[DP * ROWS], s[DECODE_CHUNK_KEYS * ROWS];
  alignas(64) float q[DP], key_copies[DECODE_CHUNK_KEYS * DP], value_copies[DECODE_CHUNK_KEYS * DP];
  TileState<DP> panel;
  SequenceState<DP> states[ROWS];
};

// `count` keys and values of a head; keys are padded to whole blocks.
template <class T> struct KeyChunk {
  const T *keys[DECODE_CHUNK_KEYS], *values[DECODE_CHUNK_KEYS];
  int count;
  int64_t ahead;   // prefetch distance in elements
};

// Prefetches into the L2 cache: it allows more outstanding misses than L1, which is too small for two sequences anyway.
DK_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Calls visit(places, count <= DECODE_CHUNK_KEYS) for successive chunks of the positions in `runs` before `limit`.
template <class Visit> DK_INLINE void for_each_chunk(DecodeSchedule::Runs runs, int64_t limit, const Visit& visit) {
  int32_t places[DECODE_CHUNK_KEYS];
  int count = 0;
  for (int32_t i = 0; i < runs.count; ++i) {
    const int32_t begin = runs.pairs[2 * i], end = begin + runs.pairs[2 * i + 1];
    for (int32_t place = begin; place < end && place < limit; ++place) {
      places[count++] = place;
      if (count == DECODE_CHUNK_KEYS) {
        visit(places, count);
        count = 0;
      }
    }
  }
  if (count) visit(places, count);
}

// Compiler barrier: forces stored values to be rounded, so that a product and a later sum are not fused in only one of
// the two paths.
DK_INLINE void settle() { asm volatile("" ::: "memory"); }

// -- one sequence

// s[j] = scale * sum_d q[d] * keys[j][d], summed in the order of products(), as in a panel; padded with -inf to whole
// vectors
template <class T, int DP>
DK_INLINE void products_of_one(const float* q, const KeyChunk<T>& chunk, float scale, float* s) {
  for (int j = 0; j < chunk.count; j += LANES) {
    Vec total{};
    for (int from = 0; from < DP; from += SPAN<DP>) {
      Vec even{}, odd{};
      for (int d = from; d < from + SPAN<DP>; d += LANES) {
        Vec block[LANES];
        DK_UNROLL_FOR (int i = 0; i < LANES; ++i) {
          block[i] = load(chunk.keys[j + i] + d);
          prefetch(chunk.keys[j + i] + d + chunk.ahead);
        }
        transpose(block);
        DK_UNROLL_FOR (int i = 0; i < LANES; i += 2) {
          even += block[i] * q[d + i];
          odd += block[i + 1] * q[d + i + 1];
        }
      }
      total += even + odd;
    }
    store(s + j, total * scale);
  }
  for (int j = chunk.count; j % LANES; ++j) s[j] = -INF;
}

// The same, summed along the head dim: fewer instructions, and rows are read one after the other.
template <class T, int DP>
DK_INLINE void products_by_row(const float* q, const KeyChunk<T>& chunk, float scale, float* s) {
  for (int j = 0; j < chunk.count; j += LANES) {
    Vec sums[LANES] = {};
    DK_UNROLL_FOR (int i = 0; i < LANES; ++i)
      for (int d = 0; d < DP; d += LANES) {
        sums[i] += load(chunk.keys[j + i] + d) * load(q + d);
        prefetch(chunk.keys[j + i] + d + chunk.ahead);
      }
    store(s + j, reduce_add_each(sums) * scale);
  }
  for (int j = chunk.count; j % LANES; ++j) s[j] = -INF;
}

// out[d] = sum_j w[j] * values[j][d], in the order of accumulate()
template <class T, int DP> DK_INLINE void accumulate_of_one(const float* w, const KeyChunk<T>& chunk, float* out) {
  constexpr int VECS = DP / LANES < 8 ? DP / LANES : 8;
  for (int d = 0; d < DP; d += VECS * LANES) {
    Vec acc[VECS] = {};
    for (int j = 0; j < chunk.count; ++j) {
      const T* value = chunk.values[j] + d;
      DK_UNROLL_FOR (int i = 0; i < VECS; ++i) {
        acc[i] += load(value + i * LANES) * w[j];
        prefetch(value + i * LANES + chunk.ahead);
      }
    }
    DK_UNROLL_FOR (int i = 0; i < VECS; ++i) store(out + d + i * LANES, acc[i]);
  }
}

// Adds a chunk with scores w.s to the state of a sequence.
template <class T, int DP>
DK_INLINE void update_sequence(DecodeSpace<DP>& w, const KeyChunk<T>& chunk, SequenceState<DP>& state) {
  settle();
  const int vectors = (chunk.count + LANES - 1) / LANES;
  const float maximum = reduce_max(running_maximum(splat(state.maximum), w.s, LANES, vectors));
  const Vec sum = weigh(w.s, LANES, vectors, splat(maximum), Exp{});
  const float alpha = exp(splat(state.maximum - maximum))[0];
  state.maximum = maximum;
  state.sum *= alpha;
  for (int d = 0; d < DP; d += LANES) store(state.out + d, load(state.out + d) * alpha);
  settle();
  state.sum += reduce_add(sum);
  accumulate_of_one<T, DP>(w.s, chunk, w.added);
  settle();
  for (int d = 0; d < DP; d += LANES) store(state.out + d, load(state.out + d) + load(w.added + d));
}

// -- a panel: all candidates of the call attend to the same keys

template <int DP> DK_INLINE void update_panel(DecodeSpace<DP>& w, const KeyChunk<float>& chunk, float scale) {
  const int count = chunk.count;
  for (int j = 0; j < count; j += GROUP_COLUMNS) products<DP>(w.qt, chunk.keys + j, scale, w.s + j * ROWS);
  for (int r = 0; r < ROWS; r += LANES) {
    SoftmaxState<> state = w.panel.at(r);
    const Vec maximum = running_maximum(state.maximum, w.s + r, ROWS, count);
    weigh(w.s + r, ROWS, count, maximum, Exp{});
    Vec sums[LANES] = {};   // sums[i] corresponds to lane i in update_sequence
    for (int j = 0; j < count; j += LANES)
      DK_UNROLL_FOR (int i = 0; i < LANES; ++i) sums[i] += j + i < count ? load(w.s + (j + i) * ROWS + r) : Vec{};
    const Vec alpha = exp(state.maximum - maximum);
    w.panel.put(r, {maximum, state.sum * alpha});
    for (int d = 0; d < DP; ++d) store(w.panel.out + d * ROWS + r, load(w.panel.out + d * ROWS + r) * alpha);
    settle();
    store(w.panel.sum + r, load(w.panel.sum + r) + reduce_add(sums));
  }
  std::memset(w.added, 0, sizeof(w.added));
  accumulate<DP>(w.s, chunk.values, count, w.added);
  for (int i = 0; i < DP * ROWS; i += LANES) store(w.panel.out + i, load(w.panel.out + i) + load(w.added + i));
}

template <class T, int DP> struct Decode {
  using Space = DecodeSpace<DP>;

  // A row of T as a row of DP elements of E: the row itself if possible, else a copy.
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

  // Calls visit(KeyChunk<E>) for the keys of the runs before `limit`. `ahead`: prefetch distance in elements.
  template <class E, class Visit>
  static void for_each_key_chunk(DecodeSchedule::Runs runs, int64_t limit, const T* k, const T* v, int64_t dim,
                                 int64_t ahead, Space& w, const Visit& visit) {
    E *key_copies = reinterpret_cast<E*>(w.key_copies), *value_copies = reinterpret_cast<E*>(w.value_copies);
    for_each_chunk(runs, limit, [&](const int32_t* places, int count) {
      KeyChunk<E> chunk;
      for (int j = 0; j < count; ++j) {
        chunk.keys[j] = row<E>(k + places[j] * dim, dim, ahead, key_copies + j * DP);
        chunk.values[j] = row<E>(v + places[j] * dim, dim, ahead, value_copies + j * DP);
      }
      // the last block is read whole
      for (int j = count; j % PADDED; ++j) chunk.keys[j] = chunk.keys[0];
      chunk.count = count;
      chunk.ahead = dim == DP ? ahead : 0;
      visit(chunk);
    });
  }

  // Processes the first `length` text keys for `count` candidates, as a panel or one by one; stores their states in
  // w.states.
  static void text(const DecodeAttentionArgs& a, DecodeSchedule::Runs runs, int64_t length, const T* q, int count,
                   const T* k, const T* v, Space& w) {
    const int64_t dim = a.head_dim;
    for (int c = 0; c < count; ++c) {
      std::memset(w.states[c].out, 0, sizeof(w.states[c].out));
      w.states[c].maximum = EMPTY_MAXIMUM, w.states[c].sum = 0.0f;
    }
    if (count < FEWEST_OF_PANEL) {
      for_each_key_chunk<T>(runs, length, k, v, dim, DECODE_CHUNK_KEYS * dim, w, [&](const KeyChunk<T>& chunk) {
        for (int c = 0; c < count; ++c) {
          fetch_row<T, DP>(q, a.q_strides.sequence, c, dim, w.q);
          products_of_one<T, DP>(w.q, chunk, a.scale, w.s);
          update_sequence<T, DP>(w, chunk, w.states[c]);
        }
      });
      return;
    }
    int32_t lanes[ROWS];
    for (int r = 0; r < ROWS; ++r) lanes[r] = r < count ? r : -1;
    pack_transposed<T, DP>(q, a.q_strides.sequence, lanes, dim, w.qt);
    std::memset(w.panel.out, 0, sizeof(w.panel.out));
    w.panel.clear_softmax();
    for_each_key_chunk<float>(runs, length, k, v, dim, 0, w,
                              [&](const KeyChunk<float>& chunk) { update_panel<DP>(w, chunk, a.scale); });
    for (int c = 0; c < count; ++c) {
      for (int d = 0; d < DP; ++d) w.states[c].out[d] = w.panel.out[d * ROWS + c];
      w.states[c].maximum = w.panel.maximum[c], w.states[c].sum = w.panel.sum[c];
    }
  }

  static void call(const DecodeAttentionArgs& a, float* workspace, int64_t prompt, int64_t head, int64_t begin,
                   int64_t end) {
    const FlushDenormals guard;
    const DecodeSchedule schedule(a.schedule);
    const int64_t dim = a.head_dim, own = schedule.slot(*a.step) * dim;
    const int64_t first = prompt * a.candidates + begin, count = end - begin;
    const auto offset = [&](SequenceStrides s) { return first * s.sequence + head * s.head; };
    const T* q = static_cast<const T*>(a.q) + offset(a.q_strides);
    const T *new_k = static_cast<const T*>(a.k) + offset(a.k_strides),
            *new_v = static_cast<const T*>(a.v) + offset(a.v_strides);
    T *image_k = static_cast<T*>(a.image_k) + offset(a.image_strides),
      *image_v = static_cast<T*>(a.image_v) + offset(a.image_strides);
    T* out = static_cast<T*>(a.out) + (first * a.heads + head) * dim;
    auto& w = *reinterpret_cast<Space*>(workspace);

    const int64_t text_len = schedule[schedule_header::text_len], prefix = (prompt * a.heads + head) * text_len * dim;
    text(a, schedule.text(*a.step), a.text_lengths ? a.text_lengths[prompt] : text_len, q, count,
         static_cast<const T*>(a.prefix_k) + prefix, static_cast<const T*>(a.prefix_v) + prefix, w);

    const int64_t next = a.image_strides.sequence;
    for (int64_t c = 0; c < count; ++c) {
      SequenceState<DP>& state = w.states[c];
      T *keys = image_k + c * next, *values = image_v + c * next;
      std::memcpy(keys + own, new_k + c * a.k_strides.sequence, dim * sizeof(T));
      std::memcpy(values + own, new_v + c * a.v_strides.sequence, dim * sizeof(T));
      fetch_row<T, DP>(q, a.q_strides.sequence, c, dim, w.q);
      for_each_key_chunk<T>(schedule.image(*a.step), schedule[schedule_header::slots], keys, values, dim,
                            c + 1 < count ? next : 0, w, [&](const KeyChunk<T>& chunk) {
                              products_by_row<T, DP>(w.q, chunk, a.scale, w.s);
                              update_sequence<T, DP>(w, chunk, state);
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

int64_t workspace(const DecodeAttentionArgs& a) { return dispatch<DecodeWorkspace>(a.dtype, a.head_dim); }
void run(const DecodeAttentionArgs& a, float* workspace, int64_t prompt, int64_t head, int64_t begin, int64_t end) {
  dispatch<Decode>(a.dtype, a.head_dim, a, workspace, prompt, head, begin, end);
}

}   // namespace

extern const DecodeAttentionKernel decode_attention;
const DecodeAttentionKernel decode_attention = {workspace, run};

}   // namespace dk::DK_ISA
