// Vectors of LANES floats. Kernels use GCC/Clang vector extensions, so that the same source compiles for every
// instruction set and for aarch64. Only this file depends on the vector width; it uses intrinsics only where the
// extensions have no equivalent.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define DK_INLINE inline __attribute__((always_inline))
#define DK_UNROLL_FOR _Pragma("GCC unroll 16") for

namespace dk::DK_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t UVec __attribute__((vector_size(LANES * 4)));
constexpr float INF = __builtin_inff(), LOG2E = 1.44269504f;

DK_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
DK_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
DK_INLINE Vec splat(float x) { return x - Vec{}; }
DK_INLINE UVec bits(Vec x) { return reinterpret_cast<UVec>(x); }
DK_INLINE Vec floats(UVec x) { return reinterpret_cast<Vec>(x); }
DK_INLINE IVec lane_index() {
  IVec v;
  for (int i = 0; i < LANES; ++i) v[i] = i;
  return v;
}

DK_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// lane i: bit i of `mask` ? a : b
DK_INLINE Vec select(uint32_t mask, Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>(mask), a);
#else
  const UVec bit = (mask - UVec{}) >> reinterpret_cast<UVec>(lane_index()) & 1u;
  return bit != 0u ? a : b;
#endif
}

DK_INLINE float reduce_add(Vec v) {   // pairwise: fixed order and small error
  float x[LANES];
  store(x, v);
  for (int w = LANES / 2; w; w /= 2)
    for (int i = 0; i < w; ++i) x[i] += x[i + w];
  return x[0];
}
DK_INLINE float reduce_max(Vec v) {
  float m = v[0];
  for (int i = 1; i < LANES; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// The sum of LANES vectors, in the order of the other reduce_add.
DK_INLINE Vec reduce_add(Vec (&v)[LANES]) {
  for (int w = LANES / 2; w; w /= 2)
    for (int i = 0; i < w; ++i) v[i] += v[i + w];
  return v[0];
}

// Interleaves (a0 b0 a1 b1 ...) the lower or upper halves of a and b.
DK_INLINE Vec zip_low(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_permutex2var_ps(a, _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0), b);
#elif defined(__AVX2__)
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
#else
  return Vec{a[0], b[0], a[1], b[1]};
#endif
}
DK_INLINE Vec zip_high(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_permutex2var_ps(a, _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8), b);
#elif defined(__AVX2__)
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
#else
  return Vec{a[2], b[2], a[3], b[3]};
#endif
}
// v[i] lane j <-> v[j] lane i. Zipping row i with row i + LANES / 2 moves one bit of the row index into the lane index.
DK_INLINE void transpose(Vec (&v)[LANES]) {
  for (int stage = 1; stage < LANES; stage *= 2) {
    Vec zipped[LANES];
    DK_UNROLL_FOR (int i = 0; i < LANES / 2; ++i) {
      zipped[2 * i] = zip_low(v[i], v[i + LANES / 2]);
      zipped[2 * i + 1] = zip_high(v[i], v[i + LANES / 2]);
    }
    DK_UNROLL_FOR (int i = 0; i < LANES; ++i) v[i] = zipped[i];
  }
}

// lane i: the sum of v[i]'s lanes
DK_INLINE Vec reduce_add_each(Vec (&v)[LANES]) {
  DK_UNROLL_FOR (int w = LANES / 2; w; w /= 2)
    DK_UNROLL_FOR (int i = 0; i < w; ++i) v[i] = zip_low(v[i], v[i + w]) + zip_high(v[i], v[i + w]);
  return v[0];
}

// 2^x for x <= 127; 0 for x < -126, including -inf. Relative error < 1.2e-7.
DK_INLINE Vec exp2(Vec x) {
  x = max(splat(-127.0f), x);        // in this order NaN stays NaN
  const float magic = 12582912.0f;   // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec n = (x + magic) - magic, f = x - n;
  Vec p = splat(1.535336191e-4f);
  p = p * f + 1.339887441e-3f;
  p = p * f + 9.618437358e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  p = p * f + 1.0f;
  const IVec e = __builtin_convertvector(n, IVec) + 127;
  return p * floats(reinterpret_cast<UVec>(e) << 23);
}

// e^x for x <= 88; 0 for x < -88, including -inf. Relative error < 1e-7, because argument reduction is exact.
DK_INLINE Vec exp(Vec x) {
  x = max(splat(-88.0f), x);   // in this order NaN stays NaN
  const float magic = 12582912.0f;
  const Vec n = (x * 1.44269504f + magic) - magic;
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;   // ln 2 in two parts, the first exact in n * part
  Vec p = splat(1.381461316e-3f);
  p = p * f + 8.368709825e-3f;
  p = p * f + 4.166838736e-2f;
  p = p * f + 1.666652069e-1f;
  p = p * f + 4.999999345e-1f;
  p = p * (f * f) + f;
  const IVec e = __builtin_convertvector(n, IVec) + 127;
  return (p + 1.0f) * floats(reinterpret_cast<UVec>(e) << 23);
}

// Flushes denormals, which are a hundred times slower, in the calling thread, and restores the previous mode.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#else
  ~FlushDenormals() {}
#endif
};

// -- element types: float, and 16-bit floats stored as their bits
struct BFloat16 {
  uint16_t x;
};
struct Float16 {
  uint16_t x;
};
#if defined(__aarch64__)
typedef __fp16 Half;   // GCC 12 supports _Float16 in C++ on x86 only
#else
typedef _Float16 Half;
#endif
DK_INLINE float to_float(float v) { return v; }
DK_INLINE float to_float(BFloat16 v) {
  const uint32_t u = static_cast<uint32_t>(v.x) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
DK_INLINE float to_float(Float16 v) {
  Half h;
  std::memcpy(&h, &v, 2);
  return static_cast<float>(h);
}
DK_INLINE void from_float(float v, float* out) { *out = v; }
DK_INLINE void from_float(float v, BFloat16* out) {   // round to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &v, 4);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  out->x = static_cast<uint16_t>(v != v ? 0x7fc0u : rounded);
}
DK_INLINE void from_float(float v, Float16* out) {
  const Half h = static_cast<Half>(v);
  std::memcpy(out, &h, 2);
}

// LANES elements as floats
DK_INLINE Vec load(const BFloat16* p) {
  typedef uint16_t Bits __attribute__((vector_size(LANES * 2)));
  Bits x;
  std::memcpy(&x, p, sizeof(x));
  return floats(__builtin_convertvector(x, UVec) << 16);
}
DK_INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v = {};
  for (int i = 0; i < LANES; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

template <class T> DK_INLINE void store_vec(Vec v, T* out) {
  float x[LANES];
  store(x, v);
  for (int i = 0; i < LANES; ++i) from_float(x[i], out + i);
}

// n elements <-> n floats
template <class T> DK_INLINE void load_row(const T* in, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = to_float(in[i]);
}
template <class T> DK_INLINE void store_row(const float* in, T* out, int n) {
  for (int i = 0; i < n; ++i) from_float(in[i], out + i);
}

}   // namespace dk::DK_ISA
