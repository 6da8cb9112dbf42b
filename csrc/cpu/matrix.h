// The matrix primitive of the bfloat16 kernels, on operands in the L1 cache:
//   C [16 M][16 N] floats  (+)=  A [16 M] rows of 2 * pairs bfloat16  x  B [pairs][16 N] dwords,
// where a dword of B holds two consecutive rows of the right operand. AMX multiplies tiles; AVX512-BF16 broadcasts a
// dword of A, so that lanes are columns.
#pragma once
#include "cpu/vec.h"

namespace dk::DK_ISA {

// -- vectors of pairs: two bfloat16 per lane, the first in the lower half

// 32 elements; zeros from element n on
DK_INLINE Vec load_pairs(const BFloat16* p, int n) {
  const __mmask32 mask = n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
}

DK_INLINE __m512bh as_pairs(__m512i x) { return reinterpret_cast<__m512bh>(x); }

// (first[i], second[i]) rounded, lane by lane
DK_INLINE Vec pair_up(Vec first, Vec second) {
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves));
}

// Two rows of 32 elements become 32 pairs: out[d] = (first[d], second[d])
DK_INLINE void interleave(Vec first, Vec second, uint32_t* out) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16)), a = _mm512_castps_si512(first),
                b = _mm512_castps_si512(second);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(out + LANES, _mm512_permutex2var_epi16(a, high, b));
}

// 32 floats, rounded
DK_INLINE Vec rounded(Vec low, Vec high) { return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(high, low)); }

// Stores the first n of 32 rounded floats.
DK_INLINE void store_rounded(Vec low, Vec high, BFloat16* out, int n) {
  const __m512i x = reinterpret_cast<__m512i>(rounded(low, high));
  if (n >= 32) _mm512_storeu_si512(out, x);
  else if (n > 0) _mm512_mask_storeu_epi16(out, (1u << n) - 1, x);
}

// 2^x for x <= 127, 1 for 0 and 0 for -inf. Relative error < 9e-5, a twentieth of a rounding to bfloat16.
DK_INLINE Vec exp2_coarse(Vec x) {
  const Vec f = _mm512_reduce_ps(x, 1);   // x - floor(x)
  return _mm512_scalef_ps(((f * 7.706707e-2f + 2.2764497e-1f) * f + 6.9511679e-1f) * f + 1.0f, x);
}

#if defined(__AMX_BF16__)

// Configures all tiles as 16 rows of 64 bytes while a kernel runs.
struct MatrixUnit {
  MatrixUnit() {
    struct Config {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    alignas(64) static const Config config = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
};

// Computes C in blocks of 2 x 2 tiles, so that every loaded tile is used twice.
template <int M, int N>
void multiply(const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, int pairs,
              bool add) {
  static_assert(M % 2 == 0 && N % 2 == 0, "2 x 2 tiles");
  asm volatile("" ::: "memory");   // GCC does not model tile loads as memory reads
  for (int m = 0; m < M; m += 2)
    for (int n = 0; n < N; n += 2) {
      float *c0 = c + 16 * (m * ldc + n), *c1 = c0 + 16 * ldc;
      if (add) {
        _tile_loadd(0, c0, ldc * 4);
        _tile_loadd(1, c0 + 16, ldc * 4);
        _tile_loadd(2, c1, ldc * 4);
        _tile_loadd(3, c1 + 16, ldc * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int p = 0; p < pairs; p += 16) {
        const BFloat16* left = a + 16 * m * lda + 2 * p;
        const uint32_t* right = b + p * ldb + 16 * n;
        _tile_loadd(4, left, lda * 2);
        _tile_loadd(6, right, ldb * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + 16, ldb * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 16 * lda, lda * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c0, ldc * 4);
      _tile_stored(1, c0 + 16, ldc * 4);
      _tile_stored(2, c1, ldc * 4);
      _tile_stored(3, c1 + 16, ldc * 4);
    }
}

#elif defined(__AVX512BF16__)

struct MatrixUnit {
  MatrixUnit() {}
  ~MatrixUnit() {}
  MatrixUnit(const MatrixUnit&) = delete;
};

// Blocks of 4 rows x 4 (or 2) vectors: enough accumulators to hide the latency, and few loads per product.
template <int M, int N>
void multiply(const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, int pairs,
              bool add) {
  static_assert(N % 2 == 0, "two vectors of columns");
  constexpr int TALL = 4, WIDE = N % 4 == 0 ? 4 : 2, STEPS = 4;
  for (int n = 0; n < 16 * N; n += WIDE * LANES)
    for (int m = 0; m < 16 * M; m += TALL) {
      const BFloat16* left = a + m * lda;
      float* out = c + m * ldc + n;
      Vec sum[TALL][WIDE] = {};
      if (add) {
        DK_UNROLL_FOR (int i = 0; i < TALL; ++i)
          DK_UNROLL_FOR (int k = 0; k < WIDE; ++k) sum[i][k] = load(out + i * ldc + k * LANES);
      }
      for (int step = 0; step < pairs; step += STEPS)
        DK_UNROLL_FOR (int p = step; p < step + STEPS; ++p) {
          __m512bh right[WIDE];
          DK_UNROLL_FOR (int k = 0; k < WIDE; ++k) right[k] = as_pairs(_mm512_loadu_si512(b + p * ldb + n + k * LANES));
          DK_UNROLL_FOR (int i = 0; i < TALL; ++i) {
            int32_t pair;
            std::memcpy(&pair, left + i * lda + 2 * p, sizeof(pair));
            DK_UNROLL_FOR (int k = 0; k < WIDE; ++k)
              sum[i][k] = _mm512_dpbf16_ps(sum[i][k], as_pairs(_mm512_set1_epi32(pair)), right[k]);
          }
        }
      DK_UNROLL_FOR (int i = 0; i < TALL; ++i)
        DK_UNROLL_FOR (int k = 0; k < WIDE; ++k) store(out + i * ldc + k * LANES, sum[i][k]);
    }
}

#endif

}   // namespace dk::DK_ISA
