// Online softmax: a running maximum and a running sum of weights 2^(scale * (score - maximum)). Sums relative to an
// earlier maximum are rescaled by alpha, the weight of that maximum. Roundings are explicit where the compiler might
// fuse operations in some kernels only.
#pragma once
#include "cuda/device.h"

namespace dk {

// The running maximum before the first score; finite, so that inf - inf cannot arise.
constexpr float EMPTY_MAXIMUM = -3.40282347e38f;

// 1 for the maximum itself
DK_DEVICE float weight(float score, float maximum, float scale) {
  return dev::exp2_approx(dev::mul_rn(score - maximum, scale));
}

struct SoftmaxState {
  float maximum = EMPTY_MAXIMUM, sum = 0.0f;

  // Adds `weights`, a sum of weights relative to the new maximum `now`; returns alpha.
  DK_DEVICE float update(float now, float weights, float scale) {
    const float alpha = weight(maximum, now, scale);
    sum = dev::fma(sum, alpha, weights);
    maximum = now;
    return alpha;
  }
};

}   // namespace dk
