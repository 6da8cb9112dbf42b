// Forward: a first sweep generates the noise and computes the statistics; a second one writes y = exp((x - max) / tau)
// / sum from the noisy logits in shared memory. If they do not fit, they are recomputed. The hard variant needs only
// the argmax in its second sweep.
#include "cuda/gumbel_softmax.h"

#include "cuda/gumbel_sweep.h"

namespace dk::cuda {
namespace {

using namespace sweep;

struct Params {
  GumbelSoftmaxArgs args;
  Cut cut;
};

// The first largest element. NaN counts as inf: y is NaN either way.
struct Best {
  static constexpr int WORDS = 2;
  float best = -dev::inf();
  uint32_t at = 0;

  template <class T> DK_DEVICE void update(const float (&x)[BATCH][4], int i, const Strip& s, const Batch<T>& batch) {
    DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) {
      const float value = x[r][i] == x[r][i] ? x[r][i] : dev::inf();
      if (value > best) best = value, at = batch.class_of(r) + (i >> s.log_width);
    }
  }
  DK_DEVICE void put(float* v) const { v[0] = best, v[1] = dev::as_float(at); }
  static DK_DEVICE void merge(float* a, const float* b) {
    if (b[0] > a[0] || (b[0] == a[0] && dev::as_bits(b[1]) < dev::as_bits(a[1]))) a[0] = b[0], a[1] = b[1];
  }
};

template <bool HARD, bool KL> constexpr int WORDS = (HARD ? Best::WORDS : Softmax::WORDS) + (KL ? Entropy::WORDS : 0);

DK_DEVICE void put_kl(const GumbelSoftmaxArgs& a, int64_t at, const float* entropy) {
  const float sum = entropy[1];
  dev::stg(a.max + at, entropy[0]);
  dev::stg(a.sum + at, sum);
  dev::stg(a.kl + at, entropy[2] / sum + natural_log(static_cast<float>(a.classes) / sum));
}

template <class T, bool HARD, bool KL, bool RESIDENT> DK_KERNEL(32 * MAX_WARPS, MIN_BLOCKS) forward(DK_PARAM Params p) {
  constexpr int N = WORDS<HARD, KL>, PLAIN = HARD ? Best::WORDS : Softmax::WORDS;
  const GumbelSoftmaxArgs& a = p.args;
  const Strip s(p.cut);
  const Kept<float> kept{dev::smem_base()};
  const Reduction<N> reduction(s, RESIDENT ? kept.end(s) : kept.base);
  const PhiloxKey key{static_cast<uint64_t>(dev::ldg(a.seed)), 0};
  const float scale = LOG2E / dev::ldg(a.tau);
  const auto merge = [&](float* x, const float* y) {
    if constexpr (HARD) Best::merge(x, y);
    else Softmax::merge(x, y, scale);
    if constexpr (KL) Entropy::merge(x + PLAIN, y + PLAIN);
  };

  float v[4][N];
  for (int chunk = 0; chunk < s.chunks_per_block; ++chunk) {
    Softmax noisy[4];
    Best best[4];
    Entropy plain[4];
    for (int round = 0; round < s.rounds; round += BATCH) {
      const Batch<T> batch(s, chunk, round);
      float x[BATCH][4];
      batch.load(a.logits, -dev::inf(), x);
      DK_UNROLL_FOR (int i = 0; i < 4; ++i)
        if constexpr (KL) plain[i].update(x, i);
      batch.add_noise(key, x);
      DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
        if constexpr (HARD) best[i].update(x, i, s, batch);
        else noisy[i].update(x, i, scale);
      }
      if constexpr (RESIDENT) kept.store(s, chunk, round, x);
    }
    DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
      if constexpr (HARD) best[i].put(v[i]);
      else noisy[i].put(v[i]);
      if constexpr (KL) plain[i].put(v[i] + PLAIN);
    }
    reduction.chunk(chunk, v, merge);
  }
  reduction.strip(s, p.cut.chunks, v, merge);

  DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
    if constexpr (KL)
      if (s.chunk == 0 && 4 * dev::tid() + i < 1 << s.log_width && s.place(p.cut, i) >= 0)
        put_kl(a, s.place(p.cut, i), v[i] + PLAIN);
    // replaces the sum with the factor of y; NaN instead of 1 if the row has no finite maximum
    if constexpr (HARD) v[i][0] = 1.0f + (v[i][0] - v[i][0]);
    else v[i][1] = 1.0f / v[i][1];
  }
  for (int chunk = 0; chunk < s.chunks_per_block; ++chunk)
    for (int round = 0; round < s.rounds; round += BATCH) {
      const Batch<T> batch(s, chunk, round);
      float x[BATCH][4];
      if constexpr (RESIDENT) {
        kept.load(s, chunk, round, x);
      } else if constexpr (!HARD) {
        batch.load(a.logits, -dev::inf(), x);
        batch.add_noise(key, x);
      }
      DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) {
        DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
          if constexpr (HARD) {
            const bool largest = batch.class_of(r) + (i >> s.log_width) == dev::as_bits(v[i][1]);
            x[r][i] = largest || v[i][0] != v[i][0] ? v[i][0] : 0.0f;
          } else {
            x[r][i] = weight(x[r][i], v[i][0], scale) * v[i][1];
          }
        }
      }
      batch.store(a.y, x);
    }
}

template <class T, bool HARD, bool KL> const char* launch(const GumbelSoftmaxArgs& a, void* stream) {
  Params p{a, cut(a, sizeof(Stored<T>), sizeof(float))};
  p.cut.aligned = aligned(a.logits, sizeof(Stored<T>)) && aligned(a.y, sizeof(Stored<T>));
  const int64_t kept = p.cut.kept_bytes(Kept<float>::QUAD), reduction = Reduction<WORDS<HARD, KL>>::bytes(p.cut);
  const bool resident = !HARD && kept + reduction <= dev::shared_memory_per_block();
  return dev::launch("gumbel_softmax", resident ? forward<T, HARD, KL, !HARD> : forward<T, HARD, KL, false>,
                     {p.cut.strips * p.cut.cluster, 1, p.cut.cluster}, p.cut.threads(),
                     static_cast<uint32_t>(resident ? kept + reduction : reduction), stream, p);
}

template <class T> const char* launch(const GumbelSoftmaxArgs& a, void* stream) {
  if (a.hard) return a.kl ? launch<T, true, true>(a, stream) : launch<T, true, false>(a, stream);
  return a.kl ? launch<T, false, true>(a, stream) : launch<T, false, false>(a, stream);
}

}   // namespace

const char* gumbel_softmax(const GumbelSoftmaxArgs& a, void* stream) {
  if (a.dtype == DType::float32) return launch<float>(a, stream);
  if (a.dtype == DType::bfloat16) return launch<dev::BFloat16>(a, stream);
  return launch<dev::Float16>(a, stream);
}

}   // namespace dk::cuda
