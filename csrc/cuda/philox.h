// Philox4x32-10 and Gumbel noise, a function of (seed, offset, index) specified in dalle_kernels/philox.py.
#pragma once
#include "cuda/device.h"
#include "cuda/math.h"

namespace dk {

struct PhiloxKey {
  uint64_t seed, offset;
};

// The random words of indices [4 * block, 4 * block + 4).
DK_DEVICE dev::u32x4 philox(PhiloxKey key, uint64_t block) {
  constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(key.offset), c3 = static_cast<uint32_t>(key.offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  DK_UNROLL_FOR (int round = 0; round < 10; ++round, k0 += W0, k1 += W1) {
    const uint64_t a = static_cast<uint64_t>(c0) * M0, b = static_cast<uint64_t>(c2) * M1;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(a);
  }
  return {c0, c1, c2, c3};
}

// Random bits -> u -> -log(-log1p(-u)).
DK_DEVICE float gumbel(uint32_t bits) {
  const float u = dev::min((dev::to_float_rn(bits) + 0.5f) * 0x1p-32f, 0x1.FFFFFEp-1f);
  // 1 - u = 2^e (1 + g), where g = 2^-e - 1 - 2^-e u is exact even for small u
  const int32_t e = scaled_exponent(1.0f - u);
  const float scale = dev::as_float(0x3F800000u - static_cast<uint32_t>(e));
  return -natural_log(-log_split(e, dev::fma(-scale, u, scale - 1.0f)));
}

}   // namespace dk
