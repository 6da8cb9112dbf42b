// Philox4x32-10 and Gumbel noise, a function of (seed, offset, index) specified in dalle_kernels/philox.py.
#pragma once
#include <cstdint>

namespace dk {

struct PhiloxKey {
  uint64_t seed, offset;
};

constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57, PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;

// The four words of one block, in plain C++ for host code. Static, because this file is compiled once per instruction
// set.
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

}   // namespace dk

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

// float(x), rounded to nearest even
DK_INLINE Vec to_floats(UVec x) {
#if defined(__AVX512F__)
  return _mm512_cvtepu32_ps(reinterpret_cast<__m512i>(x));
#else
  // both halves and high * 65536 are exact; only the sum rounds
  const Vec high = __builtin_convertvector(reinterpret_cast<IVec>(x >> 16), Vec),
            low = __builtin_convertvector(reinterpret_cast<IVec>(x & 0xFFFFu), Vec);
  return high * 65536.0f + low;
#endif
}

// The functions below compute N independent vectors at a time, to hide the latency of their dependent steps.

// The words c0 to c3 of the blocks in c0. Only the low 32 bits of their lanes count.
template <int N>
DK_INLINE void philox_blocks(PhiloxKey key, WVec (&c0)[N], WVec (&c1)[N], WVec (&c2)[N], WVec (&c3)[N]) {
  DK_UNROLL_FOR (int i = 0; i < N; ++i) {
    c1[i] = c0[i] >> 32;
    c2[i] = (key.offset & 0xFFFFFFFFu) - WVec{}, c3[i] = (key.offset >> 32) - WVec{};
  }
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  DK_UNROLL_FOR (int round = 0; round < 10; ++round) {
    DK_UNROLL_FOR (int i = 0; i < N; ++i) {
      const WVec a = multiply_low(c0[i], PHILOX_M0), b = multiply_low(c2[i], PHILOX_M1);
      c0[i] = (b >> 32) ^ c1[i] ^ static_cast<uint64_t>(k0);
      c2[i] = (a >> 32) ^ c3[i] ^ static_cast<uint64_t>(k1);
      c1[i] = b, c3[i] = a;
    }
    k0 += PHILOX_W0, k1 += PHILOX_W1;
  }
}

// The random bits of N * LANES / 2 consecutive blocks, in the order of their indices.
template <int N> DK_INLINE void philox(PhiloxKey key, uint64_t block, UVec (&out)[2 * N]) {
  WVec first;
  for (int i = 0; i < LANES / 4; ++i) {   // an order in which unpacking sorts the blocks
    first[2 * i] = i;
    first[2 * i + 1] = LANES / 4 + i;
  }
  WVec c0[N], c1[N], c2[N], c3[N];
  DK_UNROLL_FOR (int i = 0; i < N; ++i) c0[i] = first + (block + i * (LANES / 2));
  philox_blocks(key, c0, c1, c2, c3);
  DK_UNROLL_FOR (int i = 0; i < N; ++i) {
    const WVec c01 = (c0[i] & 0xFFFFFFFFu) | (c1[i] << 32), c23 = (c2[i] & 0xFFFFFFFFu) | (c3[i] << 32);
    out[2 * i] = reinterpret_cast<UVec>(unpack_low(c01, c23));
    out[2 * i + 1] = reinterpret_cast<UVec>(unpack_high(c01, c23));
  }
}

// For four keys, one bit per row: whether the random bits of index row * 2^32 + 4 * `keys` + i reach the threshold.
template <int ROWS>
DK_INLINE void kept_of_block(PhiloxKey key, const int32_t* rows, int32_t keys, uint32_t threshold,
                             uint32_t (&kept)[4]) {
  constexpr int WIDE = LANES / 2;   // rows at a time
  kept[0] = kept[1] = kept[2] = kept[3] = 0;
  for (int r = 0; r < ROWS; r += 2 * WIDE) {
    WVec c[4][2];
    DK_UNROLL_FOR (int half = 0; half < 2; ++half)
      for (int i = 0; i < WIDE; ++i)
        c[0][half][i] = (static_cast<uint64_t>(static_cast<uint32_t>(rows[r + half * WIDE + i])) << 30) + keys;
    philox_blocks(key, c[0], c[1], c[2], c[3]);
    DK_UNROLL_FOR (int word = 0; word < 4; ++word)
      DK_UNROLL_FOR (int half = 0; half < 2; ++half)
        for (int i = 0; i < WIDE; ++i)
          kept[word] |= static_cast<uint32_t>(static_cast<uint32_t>(c[word][half][i]) >= threshold)
                        << (r + half * WIDE + i);
  }
}

// Returns k * 2^23 for x = 2^k * m, m in [0.75, 1.5): the exponent bits to subtract from x to get m.
DK_INLINE UVec scaled_exponent(Vec x) { return (bits(x) - 0x3F400000u) & 0xFF800000u; }

// x = -log2(2^k * (1 + f)) for f in [-0.25, 0.5], from k * 2^23. Error: 2 ulp, also near f = 0 for k = 0.
template <int N> DK_INLINE void minus_log2(const UVec (&k)[N], const Vec (&f)[N], Vec (&x)[N]) {
  constexpr float C[] = {
      7.806674006e-2f,  -1.742302321e-1f, 2.163248654e-1f,  -2.427235177e-1f, 2.881915044e-1f,
      -3.605759219e-1f, 4.809020805e-1f,  -7.213484784e-1f, 1.442695032f};   // log2(1 + f) / f, to 2.7e-8
  DK_UNROLL_FOR (int i = 0; i < N; ++i) x[i] = splat(C[0]);
  DK_UNROLL_FOR (int c = 1; c < 9; ++c) {
    DK_UNROLL_FOR (int i = 0; i < N; ++i) x[i] = x[i] * f[i] + C[c];
  }
  DK_UNROLL_FOR (int i = 0; i < N; ++i)
    x[i] = -(x[i] * f[i] + __builtin_convertvector(reinterpret_cast<IVec>(k[i]) >> 23, Vec));
}

// The noise of N * LANES / 2 consecutive blocks, see below.
template <int N> DK_INLINE void gumbel(PhiloxKey key, uint64_t block, float* out) {
  UVec random[2 * N], k[2 * N];
  Vec f[2 * N], x[2 * N];
  philox<N>(key, block, random);
  DK_UNROLL_FOR (int i = 0; i < 2 * N; ++i) {
    const Vec minus_u = max(splat(-0x1.FFFFFEp-1f), to_floats(random[i]) * -0x1p-32f - 0x1p-33f);
    k[i] = scaled_exponent(1.0f + minus_u);
    // 1 - u = 2^k (1 + f), where f = 2^-k - 1 - 2^-k u is exact even for small u
    const Vec scale = floats(0x3F800000u - k[i]);
    f[i] = (scale - 1.0f) + scale * minus_u;
  }
  minus_log2(k, f, x);
  DK_UNROLL_FOR (int i = 0; i < 2 * N; ++i) {
    k[i] = scaled_exponent(x[i]);
    f[i] = floats(bits(x[i]) - k[i]) - 1.0f;
  }
  minus_log2(k, f, x);
  DK_UNROLL_FOR (int i = 0; i < 2 * N; ++i) store(out + i * LANES, x[i]);
}

// The noise of indices [first, first + count) as -log2(-log2(1 - u)). Times log 2 it is the noise of philox.py minus a
// constant, which changes neither a softmax nor an argmax. Returns a pointer into `buffer`, which must hold
// noise_capacity(count) floats.
constexpr float LN2 = 6.93147181e-1f;
constexpr int64_t noise_capacity(int64_t count) { return count + 3 + 2 * LANES; }
static inline const float* gumbel_noise(PhiloxKey key, uint64_t first, int64_t count, float* buffer) {
  const int skip = static_cast<int>(first & 3);
  uint64_t block = first >> 2;
  int64_t i = 0;
  for (; i + 2 * LANES < count + skip; i += 4 * LANES, block += LANES) gumbel<2>(key, block, buffer + i);
  if (i < count + skip) gumbel<1>(key, block, buffer + i);
  return buffer + skip;
}

}   // namespace dk::DK_ISA
#endif
