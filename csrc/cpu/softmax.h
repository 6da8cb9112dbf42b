// Online softmax per lane. The state is a running maximum and a running sum of weights exp(score - maximum). Chunks of
// scores update it, and states merge. Sums relative to an earlier maximum are rescaled by alpha = exp(earlier maximum -
// maximum).
#pragma once
#include "cpu/vec.h"

namespace dk::DK_ISA {

// The running maximum before the first score. Finite, so that inf - inf cannot arise; weights of -inf relative to it
// are 0.
constexpr float EMPTY_MAXIMUM = -3.40282347e38f;

// score - maximum -> weight
struct Exp {
  float scale = 1.0f;
  DK_INLINE Vec operator()(Vec x) const { return exp(x * scale); }
};
struct Exp2 {
  float scale;
  DK_INLINE Vec operator()(Vec x) const { return exp2(x * scale); }
};

// The maximum over `count` more scores per lane, `stride` floats apart.
DK_INLINE Vec running_maximum(Vec maximum, const float* scores, int64_t stride, int count) {
  for (int j = 0; j < count; ++j) maximum = max(maximum, load(scores + j * stride));
  return maximum;
}

// Replaces scores with weights; returns their sum.
template <class Weight>
DK_INLINE Vec weigh(float* scores, int64_t stride, int count, Vec maximum, const Weight& weight) {
  Vec sum{};
  for (int j = 0; j < count; ++j) {
    const Vec w = weight(load(scores + j * stride) - maximum);
    sum += w;
    store(scores + j * stride, w);
  }
  return sum;
}

DK_INLINE void rescale_and_add(Vec& sum, Vec alpha, Vec x) { sum = sum * alpha + x; }

template <class Sum = Vec> struct SoftmaxState {
  Vec maximum = splat(EMPTY_MAXIMUM);
  Sum sum = {};

  // Replaces a chunk of scores with weights and adds them; returns alpha.
  template <class Weight> DK_INLINE Vec update(float* scores, int64_t stride, int count, const Weight& weight) {
    const Vec now = running_maximum(maximum, scores, stride, count);
    return update(now, weigh(scores, stride, count, now, weight), weight);
  }
  // The same, given `weights`, the sum of the chunk's weights relative to the new maximum `now`.
  template <class Weight> DK_INLINE Vec update(Vec now, Vec weights, const Weight& weight) {
    const Vec alpha = weight(maximum - now);
    maximum = now;
    rescale_and_add(sum, alpha, weights);
    return alpha;
  }

  // Rescale factors of the two unnormalised outputs when states merge.
  struct Factors {
    Vec own, other;
  };
  template <class Weight> DK_INLINE Factors merge(const SoftmaxState& other, const Weight& weight) {
    const Vec now = max(maximum, other.maximum);
    const Factors factors = {weight(maximum - now), weight(other.maximum - now)};
    maximum = now;
    sum = sum * factors.own + other.sum * factors.other;
    return factors;
  }

  DK_INLINE Vec normalize(Vec out) const { return out / sum; }
};

}   // namespace dk::DK_ISA
