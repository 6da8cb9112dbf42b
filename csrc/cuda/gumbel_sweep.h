// Shared by the forward and backward pass of gumbel_softmax: the tiling of [outer, classes, inner], the elements of a
// lane, running statistics and their reduction.
//
// A strip is up to 32 adjacent positions with all their classes. A warp reads 128 elements at a time, one quad per
// lane: 4 elements that are contiguous in memory and share a Philox block. With 3 positions or more, a quad is 4
// positions of a class; with 1 or 2 it spans classes. Strips are split into chunks of classes, and chunks into rounds
// of up to 8 warps. All sizes depend on the shape of one strip only, and statistics are merged in a fixed order: lanes,
// then warps, then chunks. Results therefore do not depend on whether one block processes all chunks or the blocks of a
// cluster one each, nor on whether a block keeps its elements in shared memory or reads them twice.
#pragma once
#include "common/gumbel_softmax.h"
#include "cuda/element.h"
#include "cuda/philox.h"
#include "cuda/softmax.h"

namespace dk::sweep {

constexpr int MAX_WARPS = 8;       // per block
constexpr int MIN_BLOCKS = 2;      // per multiprocessor: one reads while the other writes
constexpr int BATCH = 4;           // rounds with loads in flight
constexpr int MAX_LOG_WIDTH = 5;   // log2 of the positions of a strip
constexpr int SECTOR = 32;         // smallest memory transaction in bytes
constexpr int MAX_CHUNKS = 8;      // blocks of a portable cluster
// shared memory of a chunk: two blocks fit a multiprocessor of sm_80, three one of sm_90
constexpr int64_t CHUNK_BYTES = 64 * 1024;
constexpr float FAR = -1e4f;   // exp(FAR) is 0 and so is 0 * FAR, unlike 0 * -inf

// -- tiling

struct Cut {
  int64_t classes, inner, strips_per_outer, strips;
  int log_width;        // log2 of the positions of a strip
  int warps;            // per block
  int chunks, rounds;   // per strip; per chunk
  int cluster;          // blocks per strip
  bool aligned;         // all tensors can be accessed by quads

  int width() const { return 1 << log_width; }
  int threads() const { return 32 * warps; }
  int chunks_per_block() const { return chunks / cluster; }
  int64_t kept_bytes(int quad_bytes) const {
    return static_cast<int64_t>(chunks_per_block()) * rounds * threads() * quad_bytes;
  }
};

// `kept`: bytes per element to keep in shared memory for a second sweep.
inline Cut cut(const GumbelSoftmaxArgs& a, int element_bytes, int kept) {
  Cut c{};
  c.classes = a.classes, c.inner = a.inner;
  while (c.log_width < MAX_LOG_WIDTH && c.width() < a.inner) ++c.log_width;
  while (c.width() * element_bytes > SECTOR && c.width() * a.classes * kept > MAX_CHUNKS * CHUNK_BYTES) --c.log_width;
  c.strips_per_outer = (a.inner + c.width() - 1) / c.width();
  c.strips = a.outer * c.strips_per_outer;
  const int64_t elements = a.classes * c.width();
  c.warps = c.chunks = 1;
  while (c.warps < MAX_WARPS && elements > 4 * c.threads() * BATCH) c.warps *= 2;
  while (c.chunks < MAX_CHUNKS && elements * kept > c.chunks * CHUNK_BYTES) c.chunks *= 2;
  const int64_t rounds = (elements + 4 * c.threads() - 1) / (4 * c.threads());
  c.rounds = static_cast<int>((rounds + BATCH * c.chunks - 1) / (BATCH * c.chunks) * BATCH);
  c.cluster = dev::compute_capability() >= 90 ? c.chunks : 1;
  return c;
}

inline bool aligned(const void* p, int element_bytes) {
  return reinterpret_cast<uintptr_t>(p) % (4 * element_bytes) == 0;
}

// -- elements of a lane

struct Strip {
  int64_t first;   // first element of the quad in chunk 0, round 0
  int64_t inner;
  uint32_t first_class, classes;
  int quad;   // elements of a quad that belong to the strip
  int log_width, threads, chunks_per_block, rounds;
  uint32_t chunk;   // first chunk of this block
  bool aligned;

  DK_DEVICE explicit Strip(const Cut& c)
      : inner(c.inner),
        classes(c.classes),
        log_width(c.log_width),
        threads(32 * c.warps),
        chunks_per_block(c.chunks / c.cluster),
        rounds(c.rounds),
        chunk(dev::cluster_rank() * (c.chunks / c.cluster)),
        aligned(c.aligned) {
    const int64_t at = position(c);
    first_class = 4 * dev::tid() >> log_width;
    first = (outer(c) * c.classes + first_class) * inner + at;
    quad = log_width < 2 || inner - at > 4 ? 4 : inner > at ? static_cast<int>(inner - at) : 0;
  }
  static DK_DEVICE int64_t index(const Cut& c) { return dev::bid_x() / c.cluster; }
  static DK_DEVICE int64_t outer(const Cut& c) { return index(c) / c.strips_per_outer; }
  // Position of a quad's first element
  static DK_DEVICE int64_t position(const Cut& c) {
    return ((index(c) % c.strips_per_outer) << c.log_width) + (4 * dev::tid() & ((1 << c.log_width) - 1));
  }

  // Position in the strip of element i of a quad
  DK_DEVICE int column(int i) const { return (4 * dev::tid() + i) & ((1 << log_width) - 1); }
  // Its index in [outer, inner], or -1 if it does not exist.
  DK_DEVICE int64_t place(const Cut& c, int i) const {
    const int64_t at = position(c) + (i & ((1 << c.log_width) - 1));
    return at < inner ? outer(c) * inner + at : -1;
  }
};

// A lane's quads in BATCH rounds.
template <class T> struct Batch {
  int64_t at, stride;   // index of the first element; stride of rounds
  uint32_t first_class, classes, classes_per_round;
  int quad, log_width;
  bool full;   // all elements exist and can be accessed by quads

  DK_DEVICE Batch(const Strip& s, int chunk, int round)
      : classes(s.classes), classes_per_round(4 * s.threads >> s.log_width), quad(s.quad), log_width(s.log_width) {
    const int64_t classes_before = ((s.chunk + chunk) * static_cast<int64_t>(s.rounds) + round) * classes_per_round;
    first_class = s.first_class + static_cast<uint32_t>(classes_before);
    at = s.first + classes_before * s.inner, stride = classes_per_round * s.inner;   // stride is a multiple of 4
    full = s.aligned && at % 4 == 0 && count(BATCH - 1) == 4;
  }
  DK_DEVICE uint32_t class_of(int r) const { return first_class + r * classes_per_round; }
  // Number of elements of the quad that exist; they come first. (None exist beyond 2^31 classes.)
  DK_DEVICE int count(int r) const {
    const int remaining = static_cast<int>(classes - class_of(r)), elements = (remaining < 0   ? 0
                                                                               : remaining < 4 ? remaining
                                                                                               : 4)
                                                                              << log_width;
    return elements < quad ? elements : quad;
  }

  DK_DEVICE void load(const void* base, float fill, float (&x)[BATCH][4]) const {
    const Stored<T>* p = static_cast<const Stored<T>*>(base) + at;
    if (full) {
      DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) load_quad(T{}, p + r * stride, x[r]);
    } else {
      DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) {
        DK_UNROLL_FOR (int i = 0; i < 4; ++i)
          x[r][i] = i < count(r) ? Element<T>::widen(dev::ldg(p + r * stride + i)) : fill;
      }
    }
  }
  DK_DEVICE void store(void* base, const float (&x)[BATCH][4]) const {
    Stored<T>* p = static_cast<Stored<T>*>(base) + at;
    if (full) {
      DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) store_quad(T{}, p + r * stride, x[r]);
    } else {
      DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) {
        DK_UNROLL_FOR (int i = 0; i < 4; ++i)
          if (i < count(r)) dev::stg(p + r * stride + i, Element<T>::narrow(x[r][i]));
      }
    }
  }
  // The noise index of an element is its index in the tensor, in 64 bits.
  DK_DEVICE void add_noise(PhiloxKey key, float (&x)[BATCH][4]) const {
    const int skip = static_cast<int>(at % 4);
    DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) {
      if (count(r) == 0) continue;
      const uint64_t block = static_cast<uint64_t>(at + r * stride) / 4;
      dev::u32x4 w = philox(key, block);
      if (skip) {   // the quad ends in the next block
        const dev::u32x4 next = philox(key, block + 1);
        w = skip == 1   ? dev::u32x4{w.y, w.z, w.w, next.x}
            : skip == 2 ? dev::u32x4{w.z, w.w, next.x, next.y}
                        : dev::u32x4{w.w, next.x, next.y, next.z};
      }
      x[r][0] += gumbel(w.x), x[r][1] += gumbel(w.y), x[r][2] += gumbel(w.z), x[r][3] += gumbel(w.w);
    }
  }
};

// Quads of a block's chunks in shared memory. Each is written and read by the same thread.
template <class T> struct Kept {
  static constexpr int QUAD = 4 * sizeof(Stored<T>);
  uint32_t base;

  DK_DEVICE uint32_t end(const Strip& s) const {
    return base + static_cast<uint32_t>(s.chunks_per_block * s.rounds * s.threads) * QUAD;
  }
  DK_DEVICE uint32_t address(const Strip& s, int chunk, int round) const {
    return base + static_cast<uint32_t>((chunk * s.rounds + round) * s.threads + dev::tid()) * QUAD;
  }
  DK_DEVICE void store(const Strip& s, int chunk, int round, const float (&x)[BATCH][4]) const {
    DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) store_shared_quad(T{}, address(s, chunk, round + r), x[r]);
  }
  DK_DEVICE void load(const Strip& s, int chunk, int round, float (&x)[BATCH][4]) const {
    DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) load_shared_quad(T{}, address(s, chunk, round + r), x[r]);
  }
};

// -- online-softmax states per element of a lane's quads, so that summation chains are short. `scale` is log2(e) / tau.

DK_DEVICE float not_below_far(float d) { return d < FAR ? FAR : d; }   // NaN stays

DK_DEVICE float running_maximum(float maximum, const float (&x)[BATCH][4], int i) {
  DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) maximum = dev::max(maximum, x[r][i]);
  return maximum;
}

// Running maximum, and running sum of exp(scale * (x - maximum)). NaN and +inf turn the sum into NaN.
struct Softmax {
  static constexpr int WORDS = 2;
  SoftmaxState state;

  DK_DEVICE void update(const float (&x)[BATCH][4], int i, float scale) {
    const float now = running_maximum(state.maximum, x, i);
    float batch = 0.0f;
    DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) batch += weight(x[r][i], now, scale);
    state.update(now, batch, scale);
  }
  DK_DEVICE void put(float* v) const { v[0] = state.maximum, v[1] = state.sum; }
  static DK_DEVICE void merge(float* a, const float* b, float scale) {
    const float now = dev::max(a[0], b[0]);
    a[1] = dev::add_rn(dev::mul_rn(a[1], weight(a[0], now, scale)), dev::mul_rn(b[1], weight(b[0], now, scale)));
    a[0] = now;
  }
};

// The same, plus the sum of exp(scale * (x - maximum)) * v.
struct WeightedSoftmax {
  static constexpr int WORDS = 3;
  Softmax softmax;
  float weighted = 0.0f;

  DK_DEVICE void update(const float (&x)[BATCH][4], const float (&v)[BATCH][4], int i, float scale) {
    const float old = softmax.state.maximum, now = running_maximum(old, x, i);
    float batch = 0.0f;
    DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) batch = dev::fma(weight(x[r][i], now, scale), v[r][i], batch);
    weighted = dev::fma(weighted, weight(old, now, scale), batch);
    softmax.update(x, i, scale);
  }
  DK_DEVICE void put(float* v) const { softmax.put(v), v[2] = weighted; }
  static DK_DEVICE void merge(float* a, const float* b, float scale) {
    const float now = dev::max(a[0], b[0]);
    a[2] = dev::add_rn(dev::mul_rn(a[2], weight(a[0], now, scale)), dev::mul_rn(b[2], weight(b[0], now, scale)));
    Softmax::merge(a, b, scale);
  }
};

// Running maximum, running sum of exp(x - maximum), and of exp(x - maximum) * (x - maximum).
struct Entropy {
  static constexpr int WORDS = 3;
  SoftmaxState state;
  float weighted = 0.0f;

  DK_DEVICE void update(const float (&x)[BATCH][4], int i) {
    const float now = running_maximum(state.maximum, x, i), shift = not_below_far(state.maximum - now),
                alpha = weight(shift, 0.0f, LOG2E);
    float batch = 0.0f, batch_weighted = 0.0f;
    DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) {
      const float d = not_below_far(x[r][i] - now), w = weight(d, 0.0f, LOG2E);
      batch += w;
      batch_weighted = dev::fma(w, d, batch_weighted);
    }
    weighted = dev::fma(dev::fma(state.sum, shift, weighted), alpha, batch_weighted);
    state = {now, dev::fma(state.sum, alpha, batch)};
  }
  DK_DEVICE void put(float* v) const { v[0] = state.maximum, v[1] = state.sum, v[2] = weighted; }
  static DK_DEVICE void merge(float* a, const float* b) {
    const float now = dev::max(a[0], b[0]), shift_a = not_below_far(a[0] - now), shift_b = not_below_far(b[0] - now);
    const float alpha = weight(shift_a, 0.0f, LOG2E), beta = weight(shift_b, 0.0f, LOG2E);
    a[2] = dev::add_rn(dev::mul_rn(alpha, dev::fma(a[1], shift_a, a[2])),
                       dev::mul_rn(beta, dev::fma(b[1], shift_b, b[2])));
    a[1] = dev::add_rn(dev::mul_rn(alpha, a[1]), dev::mul_rn(beta, b[1]));
    a[0] = now;
  }
};

// -- reduction of N numbers per element. merge(a, b) must be symmetric: lanes compute the same result with swapped
// arguments

template <int N> struct Reduction {
  uint32_t warps, chunks, whole;   // [warps of the block][width][N], [chunks per block][width][N], [width][N]
  int log_width, warp_count;

  static uint32_t bytes(const Cut& c) { return (c.warps + c.chunks_per_block() + 1) * c.width() * N * 4; }
  DK_DEVICE Reduction(const Strip& s, uint32_t smem) : warps(smem), log_width(s.log_width), warp_count(s.threads / 32) {
    chunks = at(warps, warp_count, 0), whole = at(chunks, s.chunks_per_block, 0);
  }
  DK_DEVICE uint32_t at(uint32_t table, int row, int column) const {
    return table + ((row << log_width) + column) * N * 4;
  }
  static DK_DEVICE void put(uint32_t at, const float* v) {
    DK_UNROLL_FOR (int k = 0; k < N; ++k) dev::sts_f32(at + 4 * k, v[k]);
  }
  static DK_DEVICE void get(uint32_t rank, uint32_t at, float* v) {
    DK_UNROLL_FOR (int k = 0; k < N; ++k) v[k] = dev::lds_f32_of(rank, at + 4 * k);
  }
  static DK_DEVICE void get(uint32_t at, float* v) {
    DK_UNROLL_FOR (int k = 0; k < N; ++k) v[k] = dev::lds_f32(at + 4 * k);
  }

  // Merges elements `i` and `j` of a quad that belong to one position.
  template <class Merge> static DK_DEVICE void merge_pair(float* i, float* j, const Merge& merge) {
    merge(i, j);
    DK_UNROLL_FOR (int k = 0; k < N; ++k) j[k] = i[k];
  }

  // Merges the lanes of every warp, then the warps.
  template <class Merge> DK_DEVICE void chunk(int index, float (&v)[4][N], const Merge& merge) const {
    if (log_width < 2) merge_pair(v[0], v[2], merge), merge_pair(v[1], v[3], merge);
    if (log_width < 1) merge_pair(v[0], v[1], merge);
    for (int lanes = 16; 4 * lanes >= 1 << log_width && lanes; lanes >>= 1) {
      DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
        float other[N];
        DK_UNROLL_FOR (int k = 0; k < N; ++k) other[k] = dev::shfl_xor(v[i][k], lanes);
        merge(v[i], other);
      }
    }
    const int tid = dev::tid(), warp = tid / 32, width = 1 << log_width;
    DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
      const int column = tid % 32 * 4 + i;
      if (column < width) put(at(warps, warp, column), v[i]);
    }
    dev::syncthreads();
    if (tid < width) {
      float a[N], b[N];
      get(at(warps, 0, tid), a);
      for (int w = 1; w < warp_count; ++w) {
        get(at(warps, w, tid), b);
        merge(a, b);
      }
      put(at(chunks, index, tid), a);
    }
    dev::syncthreads();
  }

  // Merges the chunks of all blocks; every lane gets the results of its elements' positions.
  template <class Merge> DK_DEVICE void strip(const Strip& s, int count, float (&v)[4][N], const Merge& merge) const {
    const int tid = dev::tid();
    dev::cluster_sync();
    if (tid < 1 << log_width) {
      float a[N], b[N];
      get(0u, at(chunks, 0, tid), a);
      for (int c = 1; c < count; ++c) {
        get(static_cast<uint32_t>(c / s.chunks_per_block), at(chunks, c % s.chunks_per_block, tid), b);
        merge(a, b);
      }
      put(at(whole, 0, tid), a);
    }
    dev::cluster_sync();
    DK_UNROLL_FOR (int i = 0; i < 4; ++i) get(at(whole, 0, s.column(i)), v[i]);
  }
};

}   // namespace dk::sweep
