// Exponential and logarithm with error bounds that hold on every device. dev::exp2_approx and dev::log2_approx are for
// 16-bit results.
#pragma once
#include "cuda/device.h"

namespace dk {

constexpr float LOG2E = 1.44269504f;

// 2^x for x <= 127; 0 for x < -126, including -inf. Relative error < 1.2e-7 on every device; NaN stays NaN.
DK_DEVICE float exp2(float x) {
  x = x < -127.0f ? -127.0f : x;
  // 1.5 * 2^23: rounds to the nearest integer
  const float shifted = dev::add_rn(x, 12582912.0f), f = x - dev::sub_rn(shifted, 12582912.0f);
  float p = 1.535336191e-4f;
  p = dev::fma(p, f, 1.339887441e-3f);
  p = dev::fma(p, f, 9.618437358e-3f);
  p = dev::fma(p, f, 5.550332471e-2f);
  p = dev::fma(p, f, 2.402264791e-1f);
  p = dev::fma(p, f, 6.931472029e-1f);
  p = dev::fma(p, f, 1.0f);
  return p * dev::as_float((dev::as_bits(shifted) + 127) << 23);   // the integer is in the lowest bits
}

// Returns e * 2^23 for x = 2^e * m, m in [0.75, 1.5): the exponent bits to subtract from x to get m.
DK_DEVICE int32_t scaled_exponent(float x) {
  return static_cast<int32_t>((dev::as_bits(x) - 0x3F400000u) & 0xFF800000u);
}

// log(2^e * (1 + f)) for f in [-0.25, 0.5], from e * 2^23. Error: 1 ulp, also near f = 0 for e = 0. Fusing by the
// compiler does not change the bits: products that are not explicitly fused are exact.
DK_DEVICE float log_split(int32_t scaled_e, float f) {
  float p = -4.49095816e-2f;
  p = dev::fma(p, f, 1.04483288e-1f);
  p = dev::fma(p, f, -1.31622319e-1f);
  p = dev::fma(p, f, 1.44820619e-1f);
  p = dev::fma(p, f, -1.66477672e-1f);
  p = dev::fma(p, f, 1.99906067e-1f);
  p = dev::fma(p, f, -2.50000546e-1f);
  p = dev::fma(p, f, 3.33334544e-1f);
  p = dev::fma(p, f, -5.00000008e-1f);
  // e log 2 + f and its rounding error; e times the upper part of log 2 is exact
  const float e = dev::to_float_rn(scaled_e), high = e * (0x1.62E4p-1f * 0x1p-23f), sum = high + f;
  const float lost = dev::fma(e, 1.42860677e-6f * 0x1p-23f, f - (sum - high));
  return sum + dev::fma(dev::mul_rn(f, f), p, lost);
}

// log x for positive, normal x
DK_DEVICE float natural_log(float x) {
  const int32_t e = scaled_exponent(x);
  return log_split(e, dev::as_float(dev::as_bits(x) - static_cast<uint32_t>(e)) - 1.0f);
}

}   // namespace dk
