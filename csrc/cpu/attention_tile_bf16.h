// Building blocks of attention in bfloat16 over one tile of 32 queries, on the matrix primitive. Scores are computed as
// S^T [keys][32 queries], so that softmax runs along lanes.
#pragma once
#include "cpu/attention_tile.h"
#include "cpu/matrix.h"

namespace dk::DK_ISA {

constexpr int BLOCK_KEYS = 32;   // keys per product; a chunk is padded to a multiple of it

// A [N, D] matrix of one head.
struct BFloat16Rows {
  const BFloat16* base;
  int64_t stride;
  const BFloat16* row(int32_t token) const { return base + token * stride; }
  // pairs of columns, from column d on; zeros beyond the head dim and for padding rows
  Vec pairs(int32_t token, int d, int head_dim) const {
    return token >= 0 ? load_pairs(row(token) + d, head_dim - d) : Vec{};
  }
};

// The rows of a tile as pairs of columns, [DP / 2][ROWS]: the right operand of scores. Padding rows are zero.
template <int DP> DK_INLINE void pack_columns(BFloat16Rows x, const int32_t* rows, int head_dim, uint32_t* out) {
  for (int r = 0; r < ROWS; r += LANES)
    for (int d = 0; d < DP; d += 32) {
      Vec v[LANES];
      DK_UNROLL_FOR (int i = 0; i < LANES; ++i) v[i] = x.pairs(rows[r + i], d, head_dim);
      transpose(v);
      DK_UNROLL_FOR (int i = 0; i < LANES; ++i) store(reinterpret_cast<float*>(out) + (d / 2 + i) * ROWS + r, v[i]);
    }
}

// Rows of `count` tokens as pairs of rows, [count / 2][DP]: the right operand of sums over tokens. Padding rows are
// zero.
template <int DP>
DK_INLINE void pack_rows(BFloat16Rows x, const int32_t* tokens, int count, int head_dim, uint32_t* out) {
  for (int j = 0; j < count; j += 2)
    for (int d = 0; d < DP; d += 32) {
      interleave(x.pairs(tokens[j], d, head_dim), x.pairs(tokens[j + 1], d, head_dim), out + j / 2 * DP + d);
    }
}

// The rows of BLOCK_KEYS tokens as a left operand: in place if they are evenly spaced and need no padding, else a copy.
template <int DP>
DK_INLINE BFloat16Rows left_operand(BFloat16Rows x, const int32_t* tokens, int head_dim, BFloat16* copy) {
  const int32_t step = tokens[1] - tokens[0];
  int32_t off = head_dim - DP;
  for (int j = 0; j < BLOCK_KEYS; ++j) off |= tokens[0] + j * step - tokens[j];
  if (off == 0) return {x.row(tokens[0]), step * x.stride};
  for (int j = 0; j < BLOCK_KEYS; ++j)
    for (int d = 0; d < DP; d += 32)
      store(reinterpret_cast<float*>(copy + j * DP + d), load_pairs(x.row(tokens[j]) + d, head_dim - d));
  return {copy, DP};
}

// out[head_dim] = in[DP] * factor
template <int DP> DK_INLINE void round_row(const float* in, float factor, int head_dim, BFloat16* out) {
  for (int d = 0; d < DP; d += 32)
    store_rounded(load(in + d) * factor, load(in + d + LANES) * factor, out + d, head_dim - d);
}

// Selects the kernel instance for the smallest padded head dim.
template <template <int> class Instance, class... A> DK_INLINE auto dispatch_dim(int64_t head_dim, A&&... a) {
  if (head_dim <= 32) return Instance<32>::call(a...);
  if (head_dim <= 64) return Instance<64>::call(a...);
  return Instance<128>::call(a...);
}

}   // namespace dk::DK_ISA
