// Philox4x32-10 and the Gumbel noise made of it, as dalle_kernels/philox.py specifies: a function of (seed, offset, index).
#pragma once
#include <cstdint>

namespace dk {

struct PhiloxKey {
  uint64_t seed, offset;
};

constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57, PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;

// The four words of one block, in plain C++ (host routines; static, for this file is compiled once per instruction set).
[[maybe_unused]] static inline void philox_block(PhiloxKey key, uint64_t block, uint32_t out[4]) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(key.offset), c3 = static_cast<uint32_t>(key.offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += PHILOX_W0, k1 += PHILOX_W1) {
    const uint64_t a = static_cast<uint64_t>(c0) * PHILOX_M0, b = static_cast<uint64_t>(c2) * PHILOX_M1;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(a);
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

}  // namespace dk

#if defined(DK_ISA)
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/vec.h"

namespace dk::DK_ISA {

typedef uint64_t WVec __attribute__((vector_size(LANES * 4)));   // half as many lanes, twice as wide

// Per lane: the product of the low 32 bits of `a` with `b`.
DK_INLINE WVec multiply_low(WVec a, uint32_t b) {
#if defined(__AVX512F__)
  return reinterpret_cast<WVec>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<WVec>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<WVec>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi32(static_cast<int>(b))));
#else
  return (a & 0xFFFFFFFFu) * static_cast<uint64_t>(b);
#endif
}

// Within every 128 bits: the low (high) 64 bits of `a`, then those of `b`.
DK_INLINE WVec unpack_low(WVec a, WVec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<WVec>(_mm512_unpacklo_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<WVec>(_mm256_unpacklo_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return WVec{a[0], b[0]};
#endif
}
DK_INLINE WVec unpack_high(WVec a, WVec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<WVec>(_mm512_unpackhi_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<WVec>(_mm256_unpackhi_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return WVec{a[1], b[1]};
#endif
}

// The random bits of LANES / 2 consecutive blocks, in the order of their indices: 2 * LANES words.
DK_INLINE void philox(PhiloxKey key, uint64_t block, UVec out[2]) {
  WVec c0;
  for (int i = 0; i < LANES / 4; ++i) {   // the order in which unpacking leaves the blocks sorted
    c0[2 * i] = i;
    c0[2 * i + 1] = LANES / 4 + i;
  }
  c0 += block;
  WVec c1 = c0 >> 32, c2 = (key.offset & 0xFFFFFFFFu) - WVec{}, c3 = (key.offset >> 32) - WVec{};
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  DK_UNROLL for (int round = 0; round < 10; ++round) {   // only the low 32 bits of a lane count
    const WVec a = multiply_low(c0, PHILOX_M0), b = multiply_low(c2, PHILOX_M1);
    c0 = (b >> 32) ^ c1 ^ static_cast<uint64_t>(k0);
    c2 = (a >> 32) ^ c3 ^ static_cast<uint64_t>(k1);
    c1 = b, c3 = a;
    k0 += PHILOX_W0, k1 += PHILOX_W1;
  }
  const WVec c01 = (c0 & 0xFFFFFFFFu) | (c1 << 32), c23 = (c2 & 0xFFFFFFFFu) | (c3 << 32);
  out[0] = reinterpret_cast<UVec>(unpack_low(c01, c23));
  out[1] = reinterpret_cast<UVec>(unpack_high(c01, c23));
}

// Splits x = 2^e * m, m in [0.75, 1.5): returns e * 2^23 as an integer, which is what the bits of 2^e and of x / m differ by.
DK_INLINE IVec scaled_exponent(Vec x) { return reinterpret_cast<IVec>((bits(x) - 0x3F400000u) & 0xFF800000u); }

// log(2^e * (1 + f)) for f in [-0.25, 0.5], from e * 2^23; to 0.95 units in the last place, near f = 0 too where e is 0.
DK_INLINE Vec log_split(IVec scaled_e, Vec f) {
  Vec p = splat(-4.49095816e-2f);
  p = p * f + 1.04483288e-1f;
  p = p * f - 1.31622319e-1f;
  p = p * f + 1.44820619e-1f;
  p = p * f - 1.66477672e-1f;
  p = p * f + 1.99906067e-1f;
  p = p * f - 2.50000546e-1f;
  p = p * f + 3.33334544e-1f;
  p = p * f - 5.00000008e-1f;
  // e log 2 + f with what its rounding loses; e times the upper part of log 2 is exact
  const Vec e = __builtin_convertvector(scaled_e, Vec), high = e * (0x1.62E4p-1f * 0x1p-23f), sum = high + f;
  const Vec lost = f - (sum - high) + e * (1.42860677e-6f * 0x1p-23f);
  return sum + (f * f * p + lost);
}

// Random bits -> u -> -log(-log1p(-u)).
DK_INLINE Vec gumbel(UVec x) {
  // float(x) to nearest even on every instruction set: both halves and high * 65536 are exact, so only the sum rounds
  const Vec high = __builtin_convertvector(reinterpret_cast<IVec>(x >> 16), Vec);
  const Vec low = __builtin_convertvector(reinterpret_cast<IVec>(x & 0xFFFFu), Vec);
  const Vec f = high * 65536.0f + low;
  const Vec t = (f + 0.5f) * 0x1p-32f, most = splat(0x1.FFFFFEp-1f);
  const Vec u = t < most ? t : most;
  // 1 - u = 2^e (1 + g) with g = 2^-e - 1 - 2^-e u, which is exact: no digit of a small u is lost
  const IVec e = scaled_exponent(1.0f - u);
  const Vec scale = floats(0x3F800000u - reinterpret_cast<UVec>(e));
  const Vec exponential = -log_split(e, (scale - 1.0f) - scale * u);
  const IVec k = scaled_exponent(exponential);
  return -log_split(k, floats(bits(exponential) - reinterpret_cast<UVec>(k)) - 1.0f);
}

// The noise of indices [first, first + count): returns where it begins in `buffer`, which must hold noise_capacity(count) floats.
constexpr int64_t noise_capacity(int64_t count) { return count + 3 + 2 * LANES; }
static inline const float* gumbel_noise(PhiloxKey key, uint64_t first, int64_t count, float* buffer) {
  const int skip = static_cast<int>(first & 3);
  uint64_t block = first >> 2;
  for (int64_t i = 0; i < count + skip; i += 2 * LANES, block += LANES / 2) {
    UVec x[2];
    philox(key, block, x);
    store(buffer + i, gumbel(x[0]));
    store(buffer + i + LANES, gumbel(x[1]));
  }
  return buffer + skip;
}

}  // namespace dk::DK_ISA
#endif
