// One token per row: argmax of logits / temperature + noise over the tokens that top_k and top_p keep. One block per
// row. Logits are mapped to sort keys, unsigned integers in the order of the floats, which stay in shared memory if
// they fit. Both filters keep all keys from a threshold up; the threshold is found bit by bit.
#include "cuda/sample_tokens.h"

#include "cuda/element.h"
#include "cuda/philox.h"

namespace dk::cuda {
namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr uint32_t PADDING = 0, NAN_KEY = 0xFFFFFFFFu, INF_KEY = 0xFF800000u, MINUS_INF_KEY = 0x007FFFFFu;

struct SampleTokensParams {
  SampleTokensArgs args;
  bool aligned;   // rows can be read four elements at a time
};

// The sort key of a float. NaN has the largest key, and the keys of the two zeros are equal.
DK_DEVICE uint32_t key_of(float x) {
  const uint32_t u = dev::as_bits(x + 0.0f);
  return x != x ? NAN_KEY : u ^ (u >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
DK_DEVICE float value_of(uint32_t key) { return dev::as_float(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu)); }

// The lowest bit in which keys of the dtype's values differ.
template <class T> constexpr uint32_t LOWEST_BIT = 1;
template <> constexpr uint32_t LOWEST_BIT<dev::BFloat16> = 1u << 16;
template <> constexpr uint32_t LOWEST_BIT<dev::Float16> = 1u << 13;

// Key and token in one integer; the maximum is the first token with the largest key.
DK_DEVICE uint64_t ranked(uint32_t key, uint32_t token) {
  return static_cast<uint64_t>(key) << 32 | (0xFFFFFFFFu - token);
}
DK_DEVICE uint32_t key_of_ranked(uint64_t r) { return static_cast<uint32_t>(r >> 32); }
DK_DEVICE uint32_t token_of_ranked(uint64_t r) { return 0xFFFFFFFFu - static_cast<uint32_t>(r); }

struct Larger {
  DK_DEVICE uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};
struct Sum {
  DK_DEVICE double operator()(double a, double b) const { return a + b; }
};

// Block reductions in a fixed order. Two areas of shared memory alternate, so that one barrier per reduction suffices.
struct Reduce {
  static constexpr uint32_t BYTES = 2 * WARPS * 8;
  uint32_t smem;
  uint32_t turn = 0;

  template <class Value, class Op> DK_DEVICE Value warp(Value v, Op op) const {
    DK_UNROLL_FOR (int lanes = 16; lanes; lanes >>= 1) {
      dev::u32x2 other;
      memcpy(&other, &v, 8);
      other = {dev::shfl_xor(other.x, lanes), dev::shfl_xor(other.y, lanes)};
      Value w;
      memcpy(&w, &other, 8);
      v = op(v, w);
    }
    return v;
  }
  template <class Value, class Op> DK_DEVICE Value block(Value v, Op op) {
    const uint32_t area = smem + turn * WARPS * 8;
    const int lane = dev::tid() % 32;
    turn ^= 1;
    v = warp(v, op);
    dev::u32x2 bits;
    memcpy(&bits, &v, 8);
    if (lane == 0) dev::sts8(area + dev::tid() / 32 * 8, bits);
    dev::syncthreads();
    bits = lane < WARPS ? dev::lds8(area + lane * 8) : dev::u32x2{0, 0};
    memcpy(&v, &bits, 8);
    return warp(v, op);
  }
};

// A thread reads every THREADS-th quad of tokens, and from shared memory only its own.
template <class T, bool CACHED> struct Row {
  const SampleTokensParams& p;
  const Stored<T>* logits;
  uint32_t smem;
  int quads;

  DK_DEVICE void read(int quad, uint32_t (&key)[4]) const {
    const int64_t first = 4 * static_cast<int64_t>(quad), remaining = p.args.vocabulary - first;
    if (p.aligned && remaining >= 4) {
      float x[4];
      load_quad(T{}, logits + first, x);
      DK_UNROLL_FOR (int i = 0; i < 4; ++i) key[i] = key_of(x[i]);
    } else {
      DK_UNROLL_FOR (int i = 0; i < 4; ++i)
        key[i] = i < remaining ? key_of(Element<T>::widen(dev::ldg(logits + first + i))) : PADDING;
    }
  }
  DK_DEVICE void keys(int quad, uint32_t (&key)[4]) const {
    if (!CACHED) return read(quad, key);
    const dev::u32x4 v = dev::lds16(smem + quad * 16);
    key[0] = v.x, key[1] = v.y, key[2] = v.z, key[3] = v.w;
  }
  DK_DEVICE void keep_keys(int quad, const uint32_t (&key)[4]) const {
    if (CACHED) dev::sts16(smem + quad * 16, {key[0], key[1], key[2], key[3]});
  }
  DK_DEVICE void weights(int quad, float (&weight)[4]) const {
    const dev::u32x4 v = dev::lds16(smem + (quads + quad) * 16);
    weight[0] = dev::as_float(v.x), weight[1] = dev::as_float(v.y), weight[2] = dev::as_float(v.z),
    weight[3] = dev::as_float(v.w);
  }
  DK_DEVICE void keep_weights(int quad, const float (&w)[4]) const {
    dev::sts16(smem + (quads + quad) * 16,
               {dev::as_bits(w[0]), dev::as_bits(w[1]), dev::as_bits(w[2]), dev::as_bits(w[3])});
  }
};

// Total weight of the keys >= least; weigh(quad, keys, weights) computes the weights of a quad.
template <class Row, class Weigh>
DK_DEVICE double mass_from(uint32_t least, const Row& row, Reduce& reduce, const Weigh& weigh) {
  double mass = 0.0;
  for (int quad = dev::tid(); quad < row.quads; quad += THREADS) {
    uint32_t key[4];
    float w[4];
    row.keys(quad, key);
    weigh(quad, key, w);
    DK_UNROLL_FOR (int i = 0; i < 4; ++i) w[i] = key[i] >= least ? w[i] : 0.0f;
    mass += static_cast<double>((w[0] + w[1]) + (w[2] + w[3]));
  }
  return reduce.block(mass, Sum());
}

// The largest key such that the total weight of all keys >= it is at least `target`. Its lower bits, in which no keys
// differ, are 0. Rounded sums are monotonic in the threshold too, because excluded keys are added as 0.
template <class T, class Mass> DK_DEVICE uint32_t threshold(double target, const Mass& mass) {
  uint32_t found = 0;
  for (uint32_t bit = 0x80000000u; bit >= LOWEST_BIT<T>; bit >>= 1)
    if (mass(found | bit) >= target) found |= bit;
  return found;
}

template <class T, bool CACHED>
DK_DEVICE uint32_t least_kept(const SampleTokensArgs& a, const Row<T, CACHED>& row, Reduce& reduce, float top) {
  uint32_t least = PADDING + 1;
  if (a.top_k > 0 && a.top_k < a.vocabulary) {
    const auto one = [](int, const uint32_t (&)[4], float (&w)[4]) { w[0] = w[1] = w[2] = w[3] = 1.0f; };
    least =
        threshold<T>(static_cast<double>(a.top_k), [&](uint32_t from) { return mass_from(from, row, reduce, one); });
  }
  if (a.top_p < 1.0) {
    const float scale = LOG2E / a.temperature;
    const auto compute = [&](int, const uint32_t (&key)[4], float (&w)[4]) {
      DK_UNROLL_FOR (int i = 0; i < 4; ++i)
        w[i] = key[i] >= least ? dev::exp2_approx((value_of(key[i]) - top) * scale) : 0.0f;
    };
    const auto first = [&](int quad, const uint32_t (&key)[4], float (&w)[4]) {
      compute(quad, key, w);
      if (CACHED) row.keep_weights(quad, w);
    };
    const auto again = [&](int quad, const uint32_t (&key)[4], float (&w)[4]) {
      CACHED ? row.weights(quad, w) : compute(quad, key, w);
    };
    const double target = a.top_p * mass_from(least, row, reduce, first);
    return threshold<T>(target, [&](uint32_t from) { return mass_from(from, row, reduce, again); });
  }
  return least;
}

template <class Row>
DK_DEVICE uint64_t draw(const SampleTokensArgs& a, const Row& row, Reduce& reduce, PhiloxKey philox_key, float top,
                        uint32_t least) {
  const float inverse_temperature = 1.0f / a.temperature;
  uint64_t best = 0;
  for (int quad = dev::tid(); quad < row.quads; quad += THREADS) {
    uint32_t key[4];
    row.keys(quad, key);
    if (key[0] < least && key[1] < least && key[2] < least && key[3] < least) continue;
    const dev::u32x4 random = philox(philox_key, quad);
    const uint32_t bits[4] = {random.x, random.y, random.z, random.w};
    DK_UNROLL_FOR (int i = 0; i < 4; ++i)
      if (key[i] >= least) {
        const float score = dev::fma(value_of(key[i]) - top, inverse_temperature, gumbel(bits[i]));
        best = Larger()(best, ranked(key_of(score), 4 * static_cast<uint32_t>(quad) + i));
      }
  }
  return reduce.block(best, Larger());
}

template <class T, bool CACHED> DK_KERNEL(THREADS, 2) sample_row(DK_PARAM SampleTokensParams p) {
  const SampleTokensArgs& a = p.args;
  const int64_t index = dev::bid_x();
  Reduce reduce{dev::smem_base()};
  const Row<T, CACHED> row{p, static_cast<const Stored<T>*>(a.logits) + index * a.row_stride,
                           dev::smem_base() + Reduce::BYTES, static_cast<int>((a.vocabulary + 3) / 4)};
  uint64_t best = 0;
  for (int quad = dev::tid(); quad < row.quads; quad += THREADS) {
    uint32_t key[4];
    row.read(quad, key);
    row.keep_keys(quad, key);
    DK_UNROLL_FOR (int i = 0; i < 4; ++i) best = Larger()(best, ranked(key[i], 4 * static_cast<uint32_t>(quad) + i));
  }
  best = reduce.block(best, Larger());
  // If the largest logit is not finite, its token is the result: the first NaN, else +inf; token 0 if all are -inf.
  const uint32_t top_key = key_of_ranked(best);
  if (MINUS_INF_KEY < top_key && top_key < INF_KEY) {
    const float top = value_of(top_key);
    const PhiloxKey philox_key{static_cast<uint64_t>(dev::ldg(a.seed + index)),
                               static_cast<uint64_t>(dev::ldg(a.offset + index))};
    best = draw(a, row, reduce, philox_key, top, least_kept(a, row, reduce, top));
  }
  if (dev::tid() == 0) dev::stg(a.tokens + index, static_cast<int64_t>(token_of_ranked(best)));
}

template <class T> const char* launch(const SampleTokensArgs& a, void* stream) {
  const int64_t quad_bytes = 4 * sizeof(Stored<T>);
  const bool aligned = reinterpret_cast<uintptr_t>(a.logits) % quad_bytes == 0 && a.row_stride % 4 == 0;
  // sort keys and, for top_p, weights
  const int64_t bytes = Reduce::BYTES + (a.vocabulary + 3) / 4 * (a.top_p < 1.0 ? 32 : 16);
  const bool cached = bytes <= dev::shared_memory_per_block();
  return dev::launch("sample_tokens", cached ? sample_row<T, true> : sample_row<T, false>, {a.rows}, THREADS,
                     static_cast<uint32_t>(cached ? bytes : Reduce::BYTES), stream, SampleTokensParams{a, aligned});
}

}   // namespace

const char* sample_tokens(const SampleTokensArgs& a, void* stream) {
  if (a.dtype == DType::float32) return launch<float>(a, stream);
  if (a.dtype == DType::bfloat16) return launch<dev::BFloat16>(a, stream);
  return launch<dev::Float16>(a, stream);
}

}   // namespace dk::cuda
