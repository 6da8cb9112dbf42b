// Shared by the forward and backward pass of gumbel_softmax: strips of positions with the classes as rows, and the
// sweep that generates the noise and computes the softmax. If the classes are the last dimension (inner = 1), one
// position is laid out as rows of `width` classes and its lanes are merged at the end. If they are last in memory only,
// rows are transposed as they are read and written.
#pragma once
#include "cpu/arena.h"
#include "cpu/argmax.h"
#include "cpu/gumbel_softmax.h"
#include "cpu/philox.h"
#include "cpu/softmax.h"

namespace dk::DK_ISA {

constexpr int CHUNK_ROWS = 32;               // rows per update of the softmax
constexpr int MAX_WIDTH = 64;                // lanes of a strip
constexpr int64_t WEIGHT_FLOATS = 1 << 19;   // maximum weights of a strip, so that they stay in the cache
constexpr float FAR = -1e4f;                 // exp(FAR) is 0 and so is 0 * FAR, unlike 0 * -inf

// -- geometry

struct Strip {
  int64_t begin, stride;   // element index of lane 0 in row 0; stride of rows
  int64_t stat;            // index of lane 0 in [outer, inner]
  int64_t rows;
  int lanes, last_lanes;                 // lanes in every row but the last; in the last row
  int64_t memory, row_step, lane_step;   // memory offset of lane 0 in row 0; strides of rows and lanes in memory
  int lanes_in(int64_t row) const { return row == rows - 1 ? last_lanes : lanes; }
};

// The split of [outer, classes, inner] into strips of at most `max_width` lanes.
struct Cut {
  Cut(const GumbelSoftmaxArgs& a, int max_width)
      : classes(a.classes), inner(a.inner), merge(a.inner == 1), classes_last(a.classes_last) {
    const int64_t lanes = merge ? classes : inner, pieces = (lanes + max_width - 1) / max_width;
    width = static_cast<int>(((lanes + pieces - 1) / pieces + LANES - 1) / LANES * LANES);
    per_outer = merge ? 1 : (inner + width - 1) / width;
    rows = merge ? (classes + width - 1) / width : classes;
    strips = a.outer * per_outer;
  }
  Strip strip(int64_t i) const {
    if (merge)
      return {i * classes, width, i, rows, width, static_cast<int>(classes - (rows - 1) * width),
              i * classes, width, 1};
    const int64_t outer = i / per_outer, at = i % per_outer * width;
    const int lanes = static_cast<int>(inner - at < width ? inner - at : width);
    const int64_t first = outer * classes * inner, begin = first + at, stat = outer * inner + at;
    if (classes_last) return {begin, inner, stat, rows, lanes, lanes, first + at * classes, 1, classes};
    return {begin, inner, stat, rows, lanes, lanes, begin, inner, 1};
  }
  int64_t chunks() const { return (rows + CHUNK_ROWS - 1) / CHUNK_ROWS; }

  int64_t classes, inner, rows, per_outer, strips;
  int width;    // whole vectors
  bool merge;   // lanes are classes of one position
  bool classes_last;
};

// Strips narrow enough that a sweep's weights stay in the cache.
inline Cut cut_to_cache(const GumbelSoftmaxArgs& a) {
  int width = MAX_WIDTH;
  while (a.inner > 1 && width > LANES && width * a.classes > WEIGHT_FLOATS) width /= 2;
  return Cut(a, width);
}

// -- rows of a strip

// Calls block(row, lane, rows, lanes) for every block of at most LANES x LANES in `count` rows.
template <class Block> DK_INLINE void for_each_block(const Strip& s, int count, int width, const Block& block) {
  for (int j = 0; j < width; j += LANES)
    for (int r = 0; r < count; r += LANES)
      block(r, j, count - r < LANES ? count - r : LANES, s.lanes - j < LANES ? s.lanes - j : LANES);
}

// fetch and put if rows, not lanes, are adjacent in memory
template <class T> void fetch_across(const T* in, const Strip& s, int count, int width, float fill, float* out) {
  for_each_block(s, count, width, [&](int row, int lane, int rows, int lanes) {
    const T* from = in + lane * s.lane_step + row;
    float* to = out + row * width + lane;
    if (rows < LANES || lanes < LANES) {
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < LANES; ++i) to[r * width + i] = i < lanes ? to_float(from[i * s.lane_step + r]) : fill;
      return;
    }
    Vec v[LANES];
    DK_UNROLL_FOR (int i = 0; i < LANES; ++i) v[i] = load(from + i * s.lane_step);
    transpose(v);
    DK_UNROLL_FOR (int r = 0; r < LANES; ++r) store(to + r * width, v[r]);
  });
}
template <class T> void put_across(const float* in, const Strip& s, int count, int width, T* out) {
  for_each_block(s, count, width, [&](int row, int lane, int rows, int lanes) {
    const float* from = in + row * width + lane;
    T* to = out + lane * s.lane_step + row;
    if (rows < LANES || lanes < LANES) {
      for (int i = 0; i < lanes; ++i)
        for (int r = 0; r < rows; ++r) from_float(from[r * width + i], to + i * s.lane_step + r);
      return;
    }
    Vec v[LANES];
    DK_UNROLL_FOR (int r = 0; r < LANES; ++r) v[r] = load(from + r * width);
    transpose(v);
    DK_UNROLL_FOR (int i = 0; i < LANES; ++i) store_vec(v[i], to + i * s.lane_step);
  });
}

// Rows of a strip <-> floats [count][width]; missing lanes are filled.
template <class T>
DK_INLINE void fetch(const void* base, const Strip& s, int64_t row, int count, int width, float fill, float* out) {
  const T* in = static_cast<const T*>(base) + s.memory + row * s.row_step;
  if (s.lane_step > 1) return fetch_across(in, s, count, width, fill, out);
  for (int r = 0; r < count; ++r, out += width, in += s.row_step) {
    const int lanes = s.lanes_in(row + r);
    load_row(in, out, lanes);
    for (int i = lanes; i < width; ++i) out[i] = fill;
  }
}
template <class T> DK_INLINE void put(const float* in, const Strip& s, int64_t row, int count, int width, void* base) {
  T* out = static_cast<T*>(base) + s.memory + row * s.row_step;
  if (s.lane_step > 1) return put_across(in, s, count, width, out);
  for (int r = 0; r < count; ++r, in += width, out += s.row_step) store_row(in, out, s.lanes_in(row + r));
}

// The noise of a chunk of rows. The noise index of an element is its index in the tensor. Adjacent rows are generated
// together.
struct Noise {
  Noise(Arena& arena, int width) : buffer(arena.take(CHUNK_ROWS * noise_capacity(width))) {}
  void draw(PhiloxKey key, const Strip& s, int64_t row, int count, int width) {
    const uint64_t first = s.begin + row * s.stride;
    if (s.stride <= width) {
      const float* noise = gumbel_noise(key, first, (count - 1) * s.stride + width, buffer);
      for (int r = 0; r < count; ++r) rows[r] = noise + r * s.stride;
    } else {
      for (int r = 0; r < count; ++r)
        rows[r] = gumbel_noise(key, first + r * s.stride, width, buffer + r * noise_capacity(width));
    }
  }
  float* buffer;
  const float* rows[CHUNK_ROWS];
};

// -- running statistics, one per lane

// Kahan summation: the error does not grow with the number of terms.
struct KahanSum {
  static KahanSum at(const float* p, int width) { return {load(p), load(p + width)}; }
  DK_INLINE void to(float* p, int width) const {
    store(p, total);
    store(p + width, excess);
  }
  DK_INLINE void scale(Vec x) {
    total *= x;
    excess *= x;
  }
  DK_INLINE void add(Vec x) {
    const Vec y = x - excess, t = total + y;
    excess = (t - total) - y;
    total = t;
  }
  Vec total = {}, excess = {};
};
DK_INLINE void rescale_and_add(KahanSum& sum, Vec alpha, Vec x) {
  sum.scale(alpha);
  sum.add(x);
}

// The softmax of every lane of a strip: running maximum, running sum of exp(scale * (x - maximum)) and, for the
// entropy, of exp(x - maximum) * (x - maximum). NaN and +inf turn the sums into NaN.
struct StripSoftmax {
  StripSoftmax(Arena& arena, int w)
      : width(w), maximum(arena.take(w)), sum(arena.take(2 * w)), weighted(arena.take(2 * w)) {}
  void clear() {
    for (int i = 0; i < width; ++i) maximum[i] = EMPTY_MAXIMUM;
    std::memset(sum, 0, 2 * width * sizeof(float));
    std::memset(weighted, 0, 2 * width * sizeof(float));
  }
  DK_INLINE SoftmaxState<KahanSum> at(int j) const { return {load(maximum + j), KahanSum::at(sum + j, width)}; }
  DK_INLINE void put(int j, const SoftmaxState<KahanSum>& state) const {
    store(maximum + j, state.maximum);
    state.sum.to(sum + j, width);
  }

  // Replaces x [count][width] at lane j with weights, and adds them to the sum.
  DK_INLINE void update(float* x, int count, int j, float scale) {
    SoftmaxState<KahanSum> state = at(j);
    state.update(x + j, width, count, Exp2{scale});
    put(j, state);
  }

  DK_INLINE void update_entropy(const float* x, int count, int j) {
    SoftmaxState<KahanSum> state = at(j);
    const Vec far = splat(FAR), now = running_maximum(state.maximum, x + j, width, count),
              shift = max(far, state.maximum - now);
    Vec chunk{}, chunk_weighted{};
    for (int r = 0; r < count; ++r) {
      const Vec d = max(far, load(x + r * width + j) - now), weight = exp2(d * LOG2E);
      chunk += weight;
      chunk_weighted += weight * d;
    }
    KahanSum w = KahanSum::at(weighted + j, width);
    w.add(state.sum.total * shift);
    state.maximum = now;
    const Vec alpha = exp2(shift * LOG2E);
    rescale_and_add(w, alpha, chunk_weighted);
    rescale_and_add(state.sum, alpha, chunk);
    w.to(weighted + j, width);
    put(j, state);
  }

  // Merges all lanes into one position, and broadcasts its state to every lane.
  void merge_lanes(double scale) {
    float top = EMPTY_MAXIMUM;
    for (int i = 0; i < width; ++i) top = maximum[i] > top ? maximum[i] : top;
    double s = 0, w = 0;
    for (int i = 0; i < width; ++i) {
      const float shift = maximum[i] - top;
      const double alpha = __builtin_exp2(scale * shift);
      s += alpha * sum[i];
      w += alpha * (weighted[i] + static_cast<double>(sum[i]) * (shift < FAR ? FAR : shift));
    }
    for (int i = 0; i < width; ++i)
      maximum[i] = top, sum[i] = static_cast<float>(s), weighted[i] = static_cast<float>(w);
  }

  int width;
  float *maximum, *sum, *weighted;
};

// -- the sweep

struct SweepSpace {
  SweepSpace(Arena& arena, const Cut& cut, bool weights_kept)
      : x(arena.take(CHUNK_ROWS * cut.width)),
        noise(arena, cut.width),
        noisy(arena, cut.width),
        plain(arena, cut.width) {
    if (!weights_kept) return;
    weights = arena.take(cut.rows * cut.width);
    factors = arena.take(cut.chunks() * cut.width);
  }
  float* x;   // [CHUNK_ROWS][width]
  Noise noise;
  StripSoftmax noisy, plain;                      // statistics of (logits + noise) / tau, and of logits
  float *weights = nullptr, *factors = nullptr;   // [rows][width], [chunks][width]: y = weight * factor
  ArgMax best[MAX_WIDTH / LANES];
};

template <class T> struct Sweep {
  // One sweep over a strip. Soft: computes weights and factors; hard: the argmax; with KL: the statistics of the
  // logits.
  static void run(const GumbelSoftmaxArgs& a, const Cut& cut, const Strip& s, bool soft, SweepSpace& w) {
    const int width = cut.width;
    const PhiloxKey key{static_cast<uint64_t>(*a.seed), 0};
    const float scale = LOG2E / *a.tau;
    w.noisy.clear();
    w.plain.clear();
    for (int j = 0; j < width; j += LANES) w.best[j / LANES] = ArgMax();
    for (int64_t row = 0; row < s.rows; row += CHUNK_ROWS) {
      const int count = static_cast<int>(s.rows - row < CHUNK_ROWS ? s.rows - row : CHUNK_ROWS);
      fetch<T>(a.logits, s, row, count, width, -INF, w.x);
      if (a.kl)
        for (int j = 0; j < width; j += LANES) w.plain.update_entropy(w.x, count, j);
      w.noise.draw(key, s, row, count, width);
      float* noisy = soft ? w.weights + row * width : w.x;
      for (int r = 0; r < count; ++r)
        for (int j = 0; j < width; j += LANES)
          store(noisy + r * width + j, load(w.x + r * width + j) + load(w.noise.rows[r] + j) * LN2);
      for (int j = 0; j < width; j += LANES) {
        if (soft) {
          w.noisy.update(noisy, count, j, scale);
          store(w.factors + row / CHUNK_ROWS * width + j, load(w.noisy.maximum + j));
        } else {
          for (int r = 0; r < count; ++r)
            w.best[j / LANES].take(load(noisy + r * width + j), static_cast<int32_t>(row + r));
        }
      }
    }
    if (!soft) return;
    if (cut.merge) w.noisy.merge_lanes(scale);
    for (int64_t c = 0; c < cut.chunks(); ++c)
      for (int j = 0; j < width; j += LANES) {
        float* factor = w.factors + c * width + j;
        store(factor, exp2((load(factor) - load(w.noisy.maximum + j)) * scale) / load(w.noisy.sum + j));
      }
  }

  // y of rows [row, row + count), row a multiple of CHUNK_ROWS
  DK_INLINE static void soft_rows(const SweepSpace& w, int width, int64_t row, int count, float* out) {
    const float *weights = w.weights + row * width, *factor = w.factors + row / CHUNK_ROWS * width;
    for (int r = 0; r < count; ++r)
      for (int j = 0; j < width; j += LANES)
        store(out + r * width + j, load(weights + r * width + j) * load(factor + j));
  }
};

template <template <class> class Instance, class Args>
void dispatch(DType dtype, const Args& a, float* workspace, int64_t begin, int64_t end) {
  if (dtype == DType::float32) return Instance<float>::call(a, workspace, begin, end);
  if (dtype == DType::bfloat16) return Instance<BFloat16>::call(a, workspace, begin, end);
  Instance<Float16>::call(a, workspace, begin, end);
}

}   // namespace dk::DK_ISA
