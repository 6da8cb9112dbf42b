// One token per row: argmax of logits / temperature + noise over the tokens that top_k and top_p keep. Both filters
// keep all logits from a threshold up; a radix selection over the ordered bits of the floats finds it without sorting.
#include "cpu/sample_tokens.h"

#include "cpu/arena.h"
#include "cpu/argmax.h"
#include "cpu/philox.h"

namespace dk::DK_ISA {
namespace {

constexpr int64_t BLOCK_TOKENS = 16 * LANES;   // tokens per block of noise
constexpr int DIGIT_SIZE = 1 << 11;

struct Digit {
  int shift, bits;
};
constexpr Digit DIGITS[] = {{21, 11}, {10, 11}, {0, 10}};   // of a 32-bit key, the highest first

struct SampleSpace {
  SampleSpace(Arena& arena, int64_t vocabulary)
      : padded((vocabulary + BLOCK_TOKENS - 1) / BLOCK_TOKENS * BLOCK_TOKENS),
        mass(reinterpret_cast<double*>(arena.take(2 * DIGIT_SIZE))),
        noise(arena.take(noise_capacity(BLOCK_TOKENS))),
        x(arena.take(padded)),
        weight(arena.take(padded)) {}
  int64_t padded;
  double* mass;                // [DIGIT_SIZE]
  float *noise, *x, *weight;   // weight: exp((x - max) / temperature), for top_p
};

// Sort keys: unsigned integers in the order of the floats.
DK_INLINE uint32_t key_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u ^ (u >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
DK_INLINE float value_of(uint32_t key) {
  const uint32_t u = key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu);
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// The largest x[i] such that the total weight of all values >= x[i] is at least `target`; the smallest with nonzero
// weight if rounding puts the target out of reach.
template <class Weight> float threshold(const float* x, int64_t n, double target, double* mass, const Weight& weight) {
  uint32_t found = 0, known = 0;
  for (const Digit& digit : DIGITS) {
    const uint32_t size = 1u << digit.bits;
    for (uint32_t d = 0; d < size; ++d) mass[d] = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(x[i]);
      if ((key & known) == found) mass[key >> digit.shift & (size - 1)] += weight(i);
    }
    uint32_t chosen = 0;
    double above = 0.0, above_chosen = 0.0;
    for (uint32_t d = size; d-- > 0 && above < target;) {
      if (mass[d] == 0.0) continue;
      chosen = d, above_chosen = above;
      above += mass[d];
    }
    target -= above_chosen;
    found |= chosen << digit.shift;
    known |= (size - 1) << digit.shift;
  }
  return value_of(found);
}

// Replaces all values below the threshold with -inf.
void keep_from(float* x, int64_t n, float threshold) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < threshold ? -INF : x[i];
}

void keep_most_likely(const SampleTokensArgs& a, const SampleSpace& w, float top) {
  const int64_t n = a.vocabulary;
  if (a.top_k > 0 && a.top_k < n)
    keep_from(w.x, n, threshold(w.x, n, static_cast<double>(a.top_k), w.mass, [](int64_t) { return 1.0; }));
  if (a.top_p < 1.0) {
    const float scale = LOG2E / a.temperature;
    double total = 0.0;
    for (int64_t i = 0; i < n; i += LANES) {
      const Vec weight = exp2((load(w.x + i) - top) * scale);
      store(w.weight + i, weight);
      total += reduce_add(weight);
    }
    keep_from(w.x, n,
              threshold(w.x, n, a.top_p * total, w.mass, [&](int64_t i) { return static_cast<double>(w.weight[i]); }));
  }
}

int64_t draw(const SampleTokensArgs& a, const SampleSpace& w, PhiloxKey key, float top) {
  const float inverse_temperature = 1.0f / a.temperature;
  ArgMax best;
  for (int64_t block = 0; block < a.vocabulary; block += BLOCK_TOKENS) {
    const float* noise = gumbel_noise(key, block, BLOCK_TOKENS, w.noise);
    for (int64_t i = 0; i < BLOCK_TOKENS; i += LANES)
      best.take((load(w.x + block + i) - top) * inverse_temperature + load(noise + i) * LN2,
                static_cast<int32_t>(block + i));
  }
  const IVec token = best.index + lane_index();
  int chosen = 0;
  for (int i = 1; i < LANES; ++i)
    if (best.best[i] > best.best[chosen] || (best.best[i] == best.best[chosen] && token[i] < token[chosen])) chosen = i;
  return token[chosen];
}

template <class T> void sample(const SampleTokensArgs& a, float* workspace, int64_t row) {
  const FlushDenormals guard;
  Arena arena{workspace};
  const SampleSpace w(arena, a.vocabulary);
  load_row(static_cast<const T*>(a.logits) + row * a.row_stride, w.x, a.vocabulary);
  for (int64_t i = a.vocabulary; i < w.padded; ++i) w.x[i] = -INF;

  ArgMax best;
  for (int64_t i = 0; i < a.vocabulary; i += LANES) best.take(load(w.x + i), 0);
  const float top = reduce_max(best.best);
  bool nan = false;
  for (int i = 0; i < LANES; ++i) nan |= best.nan[i] != 0;
  int64_t token = 0;
  if (nan) {
    while (w.x[token] == w.x[token]) ++token;
  } else if (top == INF) {
    while (w.x[token] != top) ++token;
  } else if (top != -INF) {
    keep_most_likely(a, w, top);
    token = draw(a, w, {static_cast<uint64_t>(a.seed[row]), static_cast<uint64_t>(a.offset[row])}, top);
  }
  a.tokens[row] = token;
}

int64_t workspace(const SampleTokensArgs& a) {
  Arena arena{nullptr};
  SampleSpace(arena, a.vocabulary);
  return arena.used;
}
void run(const SampleTokensArgs& a, float* workspace, int64_t row) {
  if (a.dtype == DType::float32) return sample<float>(a, workspace, row);
  if (a.dtype == DType::bfloat16) return sample<BFloat16>(a, workspace, row);
  sample<Float16>(a, workspace, row);
}

}   // namespace

extern const SampleTokensKernel sample_tokens;
const SampleTokensKernel sample_tokens = {workspace, run};

}   // namespace dk::DK_ISA
