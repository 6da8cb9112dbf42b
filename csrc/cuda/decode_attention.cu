// One decode step. A block processes one head of up to 16 candidates of a prompt. First come the prompt's text keys,
// which the candidates share: for 16-bit types candidates are the rows of mma, and warps take tiles of 16 keys in turn.
// Then one warp per candidate processes its image keys in float32 arithmetic. The online-softmax states are passed
// through shared memory. Batch-invariant: the reduction order of a candidate does not depend on the other rows. For the
// same reason the text is not split over more blocks if there are few candidates.
#include "cuda/decode_attention.h"

#include "cuda/decode_schedule.h"
#include "cuda/element.h"
#include "cuda/softmax.h"
#include "cuda/tile.h"

namespace dk::cuda {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS, CANDIDATES = 16;
constexpr int TILE_KEYS = 16;       // text keys per warp and iteration
constexpr int LIST_PLACES = 1024;   // maximum positions per list

struct DecodeAttentionParams {
  DecodeAttentionArgs args;
  int64_t text_len, groups;   // groups of up to CANDIDATES per prompt
};

template <class T, int D> struct Shape {
  static constexpr bool MMA = sizeof(Stored<T>) == 2;
  // elements of a row per lane: 16 bytes
  static constexpr int CHUNK_ELEMENTS = 16 / sizeof(Stored<T>);
  // lanes per row, rows per warp
  static constexpr int LANES = D / CHUNK_ELEMENTS, GROUPS = 32 / LANES;
  static constexpr int PARTIALS = MMA ? WARPS : 1;   // states per candidate after the text
  // bytes of a state: unnormalised output, running maximum, running sum, 8 for alignment
  static constexpr uint32_t STATE = (D + 4) * 4;
  static constexpr uint32_t SMEM = LIST_PLACES * 4 + PARTIALS * CANDIDATES * STATE;
  static_assert(LANES >= 8 && LANES <= 32, "a warp reads whole rows");
};

// -- rows, 16 bytes per lane. ALIGNED: rows begin at multiples of 16 bytes and consist of whole chunks; otherwise
// elements are moved one by one.

// Chunk number `chunk` of a row; zeros beyond head_dim, and all zeros if not `valid`.
template <class T, bool ALIGNED> DK_DEVICE dev::u32x4 fetch(const Stored<T>* row, int chunk, int head_dim, bool valid) {
  constexpr int CHUNK_ELEMENTS = 16 / sizeof(Stored<T>);
  if (!valid || chunk * CHUNK_ELEMENTS >= head_dim) return {0, 0, 0, 0};
  row += chunk * CHUNK_ELEMENTS;
  if constexpr (ALIGNED) {
    return dev::ldg16(row);
  } else {
    Stored<T> e[CHUNK_ELEMENTS];
    DK_UNROLL_FOR (int i = 0; i < CHUNK_ELEMENTS; ++i)
      e[i] = chunk * CHUNK_ELEMENTS + i < head_dim ? dev::ldg(row + i) : Stored<T>{};
    dev::u32x4 words;
    memcpy(&words, e, 16);
    return words;
  }
}
template <class T, bool ALIGNED> DK_DEVICE void store(Stored<T>* row, int chunk, int head_dim, dev::u32x4 words) {
  constexpr int CHUNK_ELEMENTS = 16 / sizeof(Stored<T>);
  if (chunk * CHUNK_ELEMENTS >= head_dim) return;
  row += chunk * CHUNK_ELEMENTS;
  if constexpr (ALIGNED) {
    dev::stg16(row, words);
  } else {
    Stored<T> e[CHUNK_ELEMENTS];
    memcpy(e, &words, 16);
    DK_UNROLL_FOR (int i = 0; i < CHUNK_ELEMENTS; ++i)
      if (chunk * CHUNK_ELEMENTS + i < head_dim) dev::stg(row + i, e[i]);
  }
}

DK_DEVICE void widen(float, dev::u32x4 w, float (&x)[4]) {
  x[0] = dev::as_float(w.x), x[1] = dev::as_float(w.y), x[2] = dev::as_float(w.z), x[3] = dev::as_float(w.w);
}
template <class T> DK_DEVICE void widen(T, dev::u32x4 w, float (&x)[8]) {
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
  DK_UNROLL_FOR (int i = 0; i < 8; ++i) x[i] = dev::unpack(T{}, static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)));
}
DK_DEVICE dev::u32x4 narrow(float, const float (&x)[4]) {
  return {dev::as_bits(x[0]), dev::as_bits(x[1]), dev::as_bits(x[2]), dev::as_bits(x[3])};
}
template <class T> DK_DEVICE dev::u32x4 narrow(T, const float (&x)[8]) {
  return {dev::pack(T{}, x[0], x[1]), dev::pack(T{}, x[2], x[3]), dev::pack(T{}, x[4], x[5]),
          dev::pack(T{}, x[6], x[7])};
}

template <int N> DK_DEVICE void load_floats(uint32_t a, float (&x)[N]) {
  DK_UNROLL_FOR (int i = 0; i < N; i += 4) {
    const dev::u32x4 w = dev::lds16(a + i * 4);
    x[i] = dev::as_float(w.x), x[i + 1] = dev::as_float(w.y), x[i + 2] = dev::as_float(w.z),
    x[i + 3] = dev::as_float(w.w);
  }
}
template <int N> DK_DEVICE void store_floats(uint32_t a, const float (&x)[N]) {
  DK_UNROLL_FOR (int i = 0; i < N; i += 4)
    dev::sts16(a + i * 4, {dev::as_bits(x[i]), dev::as_bits(x[i + 1]), dev::as_bits(x[i + 2]), dev::as_bits(x[i + 3])});
}

// -- lists of keys

// Lists the positions of `runs` in shared memory, at most LIST_PLACES at a time, and calls body(count). Collective over
// the block.
template <class Body> DK_DEVICE void for_each_list(DecodeSchedule::Runs runs, uint32_t list, const Body& body) {
  for (int run = 0, used = 0; run < runs.count;) {
    int count = 0;
    while (run < runs.count && count < LIST_PLACES) {
      const int begin = dev::ldg(runs.pairs + 2 * run) + used, remaining = dev::ldg(runs.pairs + 2 * run + 1) - used;
      const int taken = remaining < LIST_PLACES - count ? remaining : LIST_PLACES - count;
      for (int i = dev::tid(); i < taken; i += THREADS)
        dev::sts_u32(list + (count + i) * 4, static_cast<uint32_t>(begin + i));
      count += taken;
      used = taken < remaining ? used + taken : 0;
      run += taken == remaining;
    }
    dev::syncthreads();
    body(count);
    dev::syncthreads();
  }
}
// Position number i; the last one for i >= count.
DK_DEVICE int64_t place(uint32_t list, int i, int count) {
  return dev::lds_u32(list + (i < count ? i : count - 1) * 4);
}

// -- online-softmax states. Scores are unscaled products, so that they are rounded once; `scale` converts their
// differences to exponents of 2. `out` is unnormalised.

template <class T, int D> struct State {
  static constexpr int N = Shape<T, D>::CHUNK_ELEMENTS;   // a lane holds chunk lane % LANES
  float out[N];
  SoftmaxState softmax;

  static DK_DEVICE int chunk() { return dev::tid() % Shape<T, D>::LANES; }
  DK_DEVICE void clear() {
    DK_UNROLL_FOR (float& x : out) x = 0.0f;
    softmax = {};
  }
  DK_DEVICE void load(uint32_t a) {
    load_floats(a + chunk() * N * 4, out);
    softmax = {dev::lds_f32(a + D * 4), dev::lds_f32(a + D * 4 + 4)};
  }
  // Stored by the first lanes of a warp.
  DK_DEVICE void save(uint32_t a) const {
    dev::syncwarp();
    if (dev::tid() % 32 < Shape<T, D>::LANES) store_floats(a + chunk() * N * 4, out);
    if (dev::tid() % 32 == 0) dev::sts_f32(a + D * 4, softmax.maximum), dev::sts_f32(a + D * 4 + 4, softmax.sum);
    dev::syncwarp();
  }
  DK_DEVICE void merge(const State& other, float scale) {
    const float now = dev::max(softmax.maximum, other.softmax.maximum),
                beta = weight(other.softmax.maximum, now, scale);
    const float alpha = softmax.update(now, other.softmax.sum * beta, scale);
    DK_UNROLL_FOR (int i = 0; i < N; ++i) out[i] = dev::fma(out[i], alpha, other.out[i] * beta);
  }
  // Merges the groups of the warp; the result is in the first lanes.
  DK_DEVICE void merge_groups(float scale) {
    DK_UNROLL_FOR (int lanes = Shape<T, D>::LANES; lanes < 32; lanes *= 2) {
      State other;
      DK_UNROLL_FOR (int i = 0; i < N; ++i) other.out[i] = dev::shfl_xor(out[i], lanes);
      other.softmax = {dev::shfl_xor(softmax.maximum, lanes), dev::shfl_xor(softmax.sum, lanes)};
      merge(other, scale);
    }
  }
};

// Rows of keys and values by position; those of position `own` are not in the cache.
template <class T> struct CachedRows {
  const Stored<T>*keys, *values;
  int64_t own;
  const Stored<T>*own_key, *own_value;
};

// Updates the state at `state` with the listed keys. Collective over a warp; each group of lanes reads its own rows.
template <class T, int D, bool ALIGNED>
DK_DEVICE void attend(uint32_t state, dev::u32x4 query, const CachedRows<T>& rows, int head_dim, uint32_t list,
                      int count, float scale) {
  using S = Shape<T, D>;
  // rows per group and iteration, all in flight before the first is used
  constexpr int ROWS = 8, N = S::CHUNK_ELEMENTS;
  const int chunk = State<T, D>::chunk(), group = dev::tid() % 32 / S::LANES;
  float q[N];
  widen(T{}, query, q);
  State<T, D> now;
  if (group == 0) now.load(state);
  else now.clear();
  for (int first = 0; first < count; first += ROWS * S::GROUPS) {
    dev::u32x4 key[ROWS], value[ROWS];
    DK_UNROLL_FOR (int r = 0; r < ROWS; ++r) {
      const int i = first + r * S::GROUPS + group;
      const int64_t at = place(list, i, count);
      key[r] = fetch<T, ALIGNED>(at == rows.own ? rows.own_key : rows.keys + at * head_dim, chunk, head_dim, i < count);
      value[r] =
          fetch<T, ALIGNED>(at == rows.own ? rows.own_value : rows.values + at * head_dim, chunk, head_dim, i < count);
    }
    float s[ROWS], maximum = now.softmax.maximum;
    DK_UNROLL_FOR (int r = 0; r < ROWS; ++r) {
      float k[N];
      widen(T{}, key[r], k);
      s[r] = 0.0f;
      DK_UNROLL_FOR (int i = 0; i < N; ++i) s[r] = dev::fma(q[i], k[i], s[r]);
      DK_UNROLL_FOR (int lanes = 1; lanes < S::LANES; lanes *= 2) s[r] += dev::shfl_xor(s[r], lanes);
      s[r] = first + r * S::GROUPS + group < count ? s[r] : -dev::inf();
      maximum = dev::max(maximum, s[r]);
    }
    float added[N] = {}, sum = 0.0f;   // short chains: longer ones have larger rounding errors
    DK_UNROLL_FOR (int r = 0; r < ROWS; ++r) {
      float v[N];
      widen(T{}, value[r], v);
      const float p = weight(s[r], maximum, scale);
      sum += p;
      DK_UNROLL_FOR (int i = 0; i < N; ++i) added[i] = dev::fma(p, v[i], added[i]);
    }
    const float alpha = now.softmax.update(maximum, sum, scale);
    DK_UNROLL_FOR (int i = 0; i < N; ++i) now.out[i] = dev::fma(now.out[i], alpha, added[i]);
  }
  now.merge_groups(scale);
  now.save(state);
}

// -- the text for all candidates of a block, by mma
// Fragments are loaded directly from global memory, 16 bytes per lane. This permutes elements, in the same way in
// queries and keys, whose products are summed over them, and in the columns of the result: lane 4 g + c holds elements
// 32 b + 8 c to + 7 of query and key g, and elements 64 b + 8 g to + 7 of values.
template <class T, int D, bool ALIGNED> struct TextByMma {
  static constexpr int STEPS = D / 16, COLUMNS = D / 8;
  uint32_t q[STEPS][4];
  float out[COLUMNS][4];
  SoftmaxState softmax[2];   // of candidates g and g + 8; the sums are over this lane's keys
  int head_dim;

  DK_DEVICE TextByMma(const Stored<T>* query, int64_t stride, int candidates, int head_dim) : head_dim(head_dim) {
    const int g = dev::tid() % 32 / 4, c = dev::tid() % 4;
    DK_UNROLL_FOR (int b = 0; b < D / 32; ++b)
      DK_UNROLL_FOR (int half = 0; half < 2; ++half) {
        const bool valid = g + 8 * half < candidates;
        const dev::u32x4 w = fetch<T, ALIGNED>(query + (valid ? g + 8 * half : 0) * stride, 4 * b + c, head_dim, valid);
        q[2 * b][half] = w.x, q[2 * b][2 + half] = w.y, q[2 * b + 1][half] = w.z, q[2 * b + 1][2 + half] = w.w;
      }
    DK_UNROLL_FOR (auto& column : out)
      DK_UNROLL_FOR (float& x : column) x = 0.0f;
  }

  DK_DEVICE void tile(const Stored<T>* keys, const Stored<T>* values, uint32_t list, int first, int count,
                      float scale) {
    const int g = dev::tid() % 32 / 4, c = dev::tid() % 4;
    float s[2][4] = {};
    DK_UNROLL_FOR (int t = 0; t < 2; ++t) {
      const Stored<T>* key = keys + place(list, first + 8 * t + g, count) * head_dim;
      DK_UNROLL_FOR (int b = 0; b < D / 32; ++b) {
        const dev::u32x4 w = fetch<T, ALIGNED>(key, 4 * b + c, head_dim, true);
        dev::mma(T{}, s[t], q[2 * b], w.x, w.y);
        dev::mma(T{}, s[t], q[2 * b + 1], w.z, w.w);
      }
      DK_UNROLL_FOR (int e = 0; e < 4; ++e) s[t][e] = first + 8 * t + 2 * c + e % 2 < count ? s[t][e] : -dev::inf();
    }
    DK_UNROLL_FOR (int half = 0; half < 2; ++half) {
      float now = dev::max(dev::max(s[0][2 * half], s[0][2 * half + 1]), dev::max(s[1][2 * half], s[1][2 * half + 1]));
      now = dev::max(now, dev::shfl_xor(now, 1));
      now = dev::max(softmax[half].maximum, dev::max(now, dev::shfl_xor(now, 2)));
      DK_UNROLL_FOR (int t = 0; t < 2; ++t)
        DK_UNROLL_FOR (int e = 0; e < 2; ++e) s[t][2 * half + e] = weight(s[t][2 * half + e], now, scale);
      const float alpha = softmax[half].update(
          now, (s[0][2 * half] + s[0][2 * half + 1]) + (s[1][2 * half] + s[1][2 * half + 1]), scale);
      DK_UNROLL_FOR (auto& column : out) column[2 * half] *= alpha, column[2 * half + 1] *= alpha;
    }
    uint32_t p[4];
    pack_a(T{}, s[0], s[1], p);
    DK_UNROLL_FOR (int b = 0; b < D / 64; ++b) {
      uint32_t v[4][4];   // keys 2 c, 2 c + 1, 2 c + 8, 2 c + 9
      DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
        const int64_t at = place(list, first + 8 * (i / 2) + 2 * c + i % 2, count);
        const dev::u32x4 w = fetch<T, ALIGNED>(values + at * head_dim, 8 * b + g, head_dim, true);
        v[i][0] = w.x, v[i][1] = w.y, v[i][2] = w.z, v[i][3] = w.w;
      }
      DK_UNROLL_FOR (int j = 0; j < 8; ++j) {
        const auto pair = [&](int i) {
          return j % 2 ? v[i][j / 2] >> 16 | (v[i + 1][j / 2] & 0xFFFF0000u)
                       : (v[i][j / 2] & 0xFFFFu) | v[i + 1][j / 2] << 16;
        };
        dev::mma(T{}, out[8 * b + j], p, pair(0), pair(2));
      }
    }
  }

  // Stores the states of all candidates, the first at `states`.
  DK_DEVICE void save(uint32_t states) {
    const int g = dev::tid() % 32 / 4, c = dev::tid() % 4;
    DK_UNROLL_FOR (int half = 0; half < 2; ++half) {
      const uint32_t state = states + (g + 8 * half) * Shape<T, D>::STATE;
      DK_UNROLL_FOR (int b = 0; b < D / 64; ++b)
        DK_UNROLL_FOR (int e = 0; e < 2; ++e) {
          float x[8];
          DK_UNROLL_FOR (int j = 0; j < 8; ++j) x[j] = out[8 * b + j][2 * half + e];
          store_floats(state + (64 * b + 16 * c + 8 * e) * 4, x);
        }
      float sum = softmax[half].sum;
      sum += dev::shfl_xor(sum, 1);
      sum += dev::shfl_xor(sum, 2);
      if (c == 0) dev::sts_f32(state + D * 4, softmax[half].maximum), dev::sts_f32(state + D * 4 + 4, sum);
    }
  }
};

// -- the kernel

template <class T, int D, bool ALIGNED>
DK_KERNEL(THREADS, (D <= 64 && ALIGNED ? 2 : 1))
decode(DK_PARAM DecodeAttentionParams p) {
  using S = Shape<T, D>;
  const DecodeAttentionArgs& a = p.args;
  const int head_dim = static_cast<int>(a.head_dim), warp = dev::tid() / 32, chunk = State<T, D>::chunk();
  const int64_t item = dev::bid_x() / p.groups, head = item % a.heads, begin = dev::bid_x() % p.groups * CANDIDATES;
  const int64_t first = item / a.heads * a.candidates + begin;   // sequence
  const int count = static_cast<int>(a.candidates - begin < CANDIDATES ? a.candidates - begin : CANDIDATES);
  const float scale = a.scale * LOG2E;
  const uint32_t list = dev::smem_base(), states = list + LIST_PLACES * 4;

  // A kernel cannot raise: a step beyond the image reads and writes no key, and its result is NaN.
  const DeviceDecodeSchedule schedule{a.schedule};
  const int64_t step = dev::ldg(a.step);
  const bool inside = 0 <= step && step < schedule.steps();
  const DecodeSchedule::Runs text = inside ? schedule.text(step) : DecodeSchedule::Runs{nullptr, 0};
  const DecodeSchedule::Runs image = inside ? schedule.image(step) : DecodeSchedule::Runs{nullptr, 0};
  const int64_t own = inside ? schedule.slot(step) : -1;

  const auto row = [&](const void* x, const SequenceStrides& s, int candidate) {
    return static_cast<const Stored<T>*>(x) + (first + candidate) * s.sequence + head * s.head;
  };
  const auto state = [&](int candidate) { return states + candidate * S::STATE; };
  const auto query = [&](int candidate) {
    return fetch<T, ALIGNED>(row(a.q, a.q_strides, candidate), chunk, head_dim, true);
  };
  const int64_t prefix = item * p.text_len * head_dim;
  const Stored<T>*text_keys = static_cast<const Stored<T>*>(a.prefix_k) + prefix,
        *text_values = static_cast<const Stored<T>*>(a.prefix_v) + prefix;

  if constexpr (S::MMA) {
    TextByMma<T, D, ALIGNED> all(row(a.q, a.q_strides, 0), a.q_strides.sequence, count, head_dim);
    for_each_list(text, list, [&](int keys) {
      for (int key = warp * TILE_KEYS; key < keys; key += WARPS * TILE_KEYS)
        all.tile(text_keys, text_values, list, key, keys, scale);
    });
    all.save(states + warp * CANDIDATES * S::STATE);
    dev::syncthreads();
    for (int candidate = warp; candidate < count; candidate += WARPS) {
      State<T, D> sum, part;
      sum.load(state(candidate));
      for (int w = 1; w < WARPS; ++w) {
        part.load(state(w * CANDIDATES + candidate));
        sum.merge(part, scale);
      }
      sum.save(state(candidate));
    }
  } else {
    for (int candidate = warp; candidate < count; candidate += WARPS) {
      State<T, D> none;
      none.clear();
      none.save(state(candidate));
    }
    for_each_list(text, list, [&](int keys) {
      const CachedRows<T> rows{text_keys, text_values, -1, nullptr, nullptr};
      for (int candidate = warp; candidate < count; candidate += WARPS)
        attend<T, D, ALIGNED>(state(candidate), query(candidate), rows, head_dim, list, keys, scale);
    });
  }

  for_each_list(image, list, [&](int keys) {
    for (int candidate = warp; candidate < count; candidate += WARPS) {
      // The new key and value are read from the inputs, all others from the cache.
      const CachedRows<T> rows{row(a.image_k, a.image_strides, candidate), row(a.image_v, a.image_strides, candidate),
                               own, row(a.k, a.k_strides, candidate), row(a.v, a.v_strides, candidate)};
      attend<T, D, ALIGNED>(state(candidate), query(candidate), rows, head_dim, list, keys, scale);
    }
  });

  if (dev::tid() % 32 >= S::LANES) return;
  for (int candidate = warp; candidate < count; candidate += WARPS) {
    if (inside) {
      const int64_t at =
          row(a.image_k, a.image_strides, candidate) - static_cast<const Stored<T>*>(a.image_k) + own * head_dim;
      store<T, ALIGNED>(static_cast<Stored<T>*>(a.image_k) + at, chunk, head_dim,
                        fetch<T, ALIGNED>(row(a.k, a.k_strides, candidate), chunk, head_dim, true));
      store<T, ALIGNED>(static_cast<Stored<T>*>(a.image_v) + at, chunk, head_dim,
                        fetch<T, ALIGNED>(row(a.v, a.v_strides, candidate), chunk, head_dim, true));
    }
    State<T, D> done;
    done.load(state(candidate));
    const float divide = 1.0f / done.softmax.sum;
    DK_UNROLL_FOR (float& x : done.out) x *= divide;
    store<T, ALIGNED>(static_cast<Stored<T>*>(a.out) + ((first + candidate) * a.heads + head) * head_dim, chunk,
                      head_dim, narrow(T{}, done.out));
  }
}

template <class T> bool aligned(const DecodeAttentionArgs& a) {
  const int64_t size = sizeof(Stored<T>);
  const auto strided = [&](const void* x, const SequenceStrides& s) {
    return reinterpret_cast<uintptr_t>(x) | s.sequence * size | s.head * size;
  };
  return (strided(a.q, a.q_strides) | strided(a.k, a.k_strides) | strided(a.v, a.v_strides) |
          strided(a.image_k, a.image_strides) | strided(a.image_v, a.image_strides) |
          reinterpret_cast<uintptr_t>(a.prefix_k) | reinterpret_cast<uintptr_t>(a.prefix_v) |
          reinterpret_cast<uintptr_t>(a.out) | a.head_dim * size) %
             16 ==
         0;
}

template <class T> const char* launch(const DecodeAttentionArgs& a, int64_t text_len, void* stream) {
  return with_head_dim(a.head_dim, [&](auto padded) {
    // at least 8 lanes per row
    constexpr int SMALLEST = 8 * 16 / sizeof(Stored<T>), D = padded < SMALLEST ? SMALLEST : padded;
    const int64_t groups = (a.candidates + CANDIDATES - 1) / CANDIDATES;
    return dev::launch("decode_attention", aligned<T>(a) ? decode<T, D, true> : decode<T, D, false>,
                       {a.prompts * a.heads * groups}, THREADS, Shape<T, D>::SMEM, stream,
                       DecodeAttentionParams{a, text_len, groups});
  });
}

}   // namespace

const char* decode_attention(const DecodeAttentionArgs& a, int64_t text_len, void* stream) {
  if (a.dtype == DType::float32) return launch<float>(a, text_len, stream);
  return with_element(a.dtype, [&](auto element) { return launch<decltype(element)>(a, text_len, stream); });
}

}   // namespace dk::cuda
