// Backward: y * (grad - sum y grad) / tau, plus grad_kl * p * (log p + log classes - kl) with p = softmax(logits). A
// first sweep computes the sum and keeps y and grad in shared memory for the second; if they do not fit, they are read
// twice. The hard variant has no stored soft y: its first sweep regenerates the noise, computes the softmax statistics
// along with the sum, and keeps the noisy logits instead.
#include "cuda/gumbel_softmax.h"
#include "cuda/gumbel_sweep.h"

namespace dk::cuda {
namespace {

using namespace sweep;

struct Params {
  GumbelSoftmaxBackwardArgs args;
  Cut cut;
};

// Sum of y * grad.
struct Dot {
  static constexpr int WORDS = 1;
  float sum = 0.0f;

  DK_DEVICE void update(const float (&y)[BATCH][4], const float (&grad)[BATCH][4], int i) {
    float chunk = 0.0f;
    DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) chunk = dev::fma(y[r][i], grad[r][i], chunk);
    sum = dev::add_rn(sum, chunk);
  }
  DK_DEVICE void put(float* v) const { v[0] = sum; }
  static DK_DEVICE void merge(float* a, const float* b) { a[0] = dev::add_rn(a[0], b[0]); }
};

// The gradient of the KL at x: scale * exp(x - max) * (x - max + shift).
struct KLGradient {
  float max = 0.0f, shift = 0.0f, scale = 0.0f;
  KLGradient() = default;
  DK_DEVICE KLGradient(const GumbelSoftmaxBackwardArgs& a, int64_t at) {
    const float sum = dev::ldg(a.forward.sum + at);
    max = dev::ldg(a.forward.max + at);
    shift = natural_log(static_cast<float>(a.forward.classes) / sum) - dev::ldg(a.forward.kl + at);
    scale = dev::ldg(a.grad_kl + at) / sum;
  }
  DK_DEVICE float at(float x) const {
    const float d = not_below_far(x - max);
    return dev::mul_rn(dev::mul_rn(scale, weight(d, 0.0f, LOG2E)), d + shift);
  }
};

// What is kept for y: y itself, or the noisy logits.
template <class T, bool HARD> struct Kinds {
  using First = T;
  using Statistics = Dot;
};
template <class T> struct Kinds<T, true> {
  using First = float;
  using Statistics = WeightedSoftmax;
};
template <class T, bool HARD> constexpr int QUAD_BYTES = Kept<typename Kinds<T, HARD>::First>::QUAD + Kept<T>::QUAD;

template <class T, bool HARD, bool KL, bool RESIDENT>
DK_KERNEL(32 * MAX_WARPS, MIN_BLOCKS)
backward(DK_PARAM Params p) {
  using First = typename Kinds<T, HARD>::First;
  using Statistics = typename Kinds<T, HARD>::Statistics;
  constexpr int N = Statistics::WORDS;
  const GumbelSoftmaxArgs& f = p.args.forward;
  const Strip s(p.cut);
  const Kept<First> kept_first{dev::smem_base()};
  const Kept<T> kept_grad{kept_first.end(s)};
  const Reduction<N> reduction(s, RESIDENT ? kept_grad.end(s) : kept_first.base);
  const PhiloxKey key{static_cast<uint64_t>(dev::ldg(f.seed)), 0};
  const float inverse_tau = 1.0f / dev::ldg(f.tau), scale = LOG2E / dev::ldg(f.tau);
  const auto merge = [&](float* x, const float* y) {
    if constexpr (HARD) Statistics::merge(x, y, scale);
    else Statistics::merge(x, y);
  };
  const auto read = [&](const Batch<T>& batch, float (&first)[BATCH][4], float (&grad)[BATCH][4]) {
    batch.load(p.args.grad_y, 0.0f, grad);
    if constexpr (HARD) {
      batch.load(f.logits, -dev::inf(), first);
      batch.add_noise(key, first);
    } else {
      batch.load(f.y, 0.0f, first);
    }
  };

  float v[4][N];
  for (int chunk = 0; chunk < s.chunks_per_block; ++chunk) {
    Statistics statistics[4];
    for (int round = 0; round < s.rounds; round += BATCH) {
      float first[BATCH][4], grad[BATCH][4];
      read(Batch<T>(s, chunk, round), first, grad);
      DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
        if constexpr (HARD) statistics[i].update(first, grad, i, scale);
        else statistics[i].update(first, grad, i);
      }
      if constexpr (RESIDENT) kept_first.store(s, chunk, round, first), kept_grad.store(s, chunk, round, grad);
    }
    DK_UNROLL_FOR (int i = 0; i < 4; ++i) statistics[i].put(v[i]);
    reduction.chunk(chunk, v, merge);
  }
  reduction.strip(s, p.cut.chunks, v, merge);

  float dot[4], factor[4];   // factor: y = factor * exp(scale * (x - max))
  KLGradient kl[4];
  DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
    factor[i] = 1.0f;
    if constexpr (HARD) factor[i] = 1.0f / v[i][1];
    dot[i] = HARD ? dev::mul_rn(v[i][N - 1], factor[i]) : v[i][0];
    if constexpr (KL)
      if (s.place(p.cut, i) >= 0) kl[i] = KLGradient(p.args, s.place(p.cut, i));
  }
  for (int chunk = 0; chunk < s.chunks_per_block; ++chunk)
    for (int round = 0; round < s.rounds; round += BATCH) {
      const Batch<T> batch(s, chunk, round);
      float first[BATCH][4], grad[BATCH][4];
      if constexpr (RESIDENT) kept_first.load(s, chunk, round, first), kept_grad.load(s, chunk, round, grad);
      else read(batch, first, grad);
      DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) {
        DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
          const float y = HARD ? dev::mul_rn(weight(first[r][i], v[i][0], scale), factor[i]) : first[r][i];
          grad[r][i] = dev::mul_rn(dev::mul_rn(y, inverse_tau), grad[r][i] - dot[i]);
        }
      }
      if constexpr (KL) {
        float x[BATCH][4];
        batch.load(f.logits, 0.0f, x);
        DK_UNROLL_FOR (int r = 0; r < BATCH; ++r) {
          DK_UNROLL_FOR (int i = 0; i < 4; ++i) grad[r][i] = dev::add_rn(grad[r][i], kl[i].at(x[r][i]));
        }
      }
      batch.store(p.args.grad_logits, grad);
    }
}

template <class T, bool HARD, bool KL> const char* launch(const GumbelSoftmaxBackwardArgs& a, void* stream) {
  constexpr int element = sizeof(Stored<T>), quad = QUAD_BYTES<T, HARD>;
  Params p{a, cut(a.forward, element, quad / 4)};
  p.cut.aligned = aligned(a.forward.y, element) && aligned(a.forward.logits, element) && aligned(a.grad_y, element) &&
                  aligned(a.grad_logits, element);
  const int64_t kept = p.cut.kept_bytes(quad), reduction = Reduction<Kinds<T, HARD>::Statistics::WORDS>::bytes(p.cut);
  const bool resident = kept + reduction <= dev::shared_memory_per_block();
  return dev::launch("gumbel_softmax_backward", resident ? backward<T, HARD, KL, true> : backward<T, HARD, KL, false>,
                     {p.cut.strips * p.cut.cluster, 1, p.cut.cluster}, p.cut.threads(),
                     static_cast<uint32_t>(resident ? kept + reduction : reduction), stream, p);
}

template <class T> const char* launch(const GumbelSoftmaxBackwardArgs& a, void* stream) {
  if (a.forward.hard) return a.grad_kl ? launch<T, true, true>(a, stream) : launch<T, true, false>(a, stream);
  return a.grad_kl ? launch<T, false, true>(a, stream) : launch<T, false, false>(a, stream);
}

}   // namespace

const char* gumbel_softmax_backward(const GumbelSoftmaxBackwardArgs& a, void* stream) {
  if (a.forward.dtype == DType::float32) return launch<float>(a, stream);
  if (a.forward.dtype == DType::bfloat16) return launch<dev::BFloat16>(a, stream);
  return launch<dev::Float16>(a, stream);
}

}   // namespace dk::cuda
