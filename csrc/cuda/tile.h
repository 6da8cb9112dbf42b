// Tiles of rows in shared memory, and their fragments for mma.m16n8k16. Uses mma and cp.async, which every device since
// sm_80 supports; bulk copies and wgmma of sm_90 would be added here and in the loops that use this file.
#pragma once
#include <type_traits>

#include "common/dtype.h"
#include "cuda/device.h"
#include "cuda/math.h"

namespace dk {

// -- tiles of 16-bit elements: rows of D / 8 chunks of 16 bytes, swizzled so that one chunk of 8 rows is in different
// banks
template <int D> struct Tile {
  static constexpr int CHUNKS = D / 8;
  static_assert(D % 32 == 0, "two rows or more fill all banks");

  static constexpr uint32_t bytes(int rows) { return rows * D * 2; }
  static DK_DEVICE uint32_t at(int row, int chunk) {   // byte offset
    const int moved = CHUNKS >= 8 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
    return static_cast<uint32_t>(row * CHUNKS + moved) * 16;
  }

  // Fragments; `tile` is the address of a tile. Collective over a warp.
  // a [16, 16]: rows from `row` on, chunks `chunk` and `chunk` + 1
  static DK_DEVICE void load_a(uint32_t tile, int row, int chunk, uint32_t (&a)[4]) {
    const int lane = dev::tid() & 31;
    dev::ldmatrix_x4(tile + at(row + (lane & 15), chunk + (lane >> 4)), a);
  }
  // b [16, 16] as two fragments {b[0], b[1]}, {b[2], b[3]} of 8 columns each. Its columns are rows of the tile
  // (products over the elements of rows) ...
  static DK_DEVICE void load_b(uint32_t tile, int row, int chunk, uint32_t (&b)[4]) {
    const int lane = dev::tid() & 31;
    dev::ldmatrix_x4(tile + at(row + (lane & 7) + (lane >> 4 << 3), chunk + (lane >> 3 & 1)), b);
  }
  // ... or its rows are (sums of rows).
  static DK_DEVICE void load_b_of_rows(uint32_t tile, int row, int chunk, uint32_t (&b)[4]) {
    const int lane = dev::tid() & 31;
    dev::ldmatrix_x4_trans(tile + at(row + (lane & 15), chunk + (lane >> 4)), b);
  }
};

// A fragment a [16, 16] from two adjacent accumulators [16, 8].
template <class T> DK_DEVICE void pack_a(T, const float (&left)[4], const float (&right)[4], uint32_t (&a)[4]) {
  a[0] = dev::pack(T{}, left[0], left[1]), a[1] = dev::pack(T{}, left[2], left[3]);
  a[2] = dev::pack(T{}, right[0], right[1]), a[3] = dev::pack(T{}, right[2], right[3]);
}

// -- rows of global memory
// Copies elements 8 chunk to 8 chunk + 7 of a row to `to`; zeros beyond head_dim, and all zeros if not `valid`.
// ALIGNED: rows begin at multiples of 16 bytes, head_dim is a multiple of 8, and the copy is asynchronous. Otherwise
// elements are copied one by one and synchronously (visible to other threads after the same barrier).
template <bool ALIGNED>
DK_DEVICE void copy_chunk(uint32_t to, const uint16_t* row, int chunk, int head_dim, bool valid) {
  if constexpr (ALIGNED) {
    dev::cp_async16(to, row + chunk * 8, valid && chunk * 8 < head_dim);
  } else {
    DK_ROLLED_FOR (int i = 0; i < 8; i += 2) {
      const uint32_t low = valid && chunk * 8 + i < head_dim ? dev::ldg(row + chunk * 8 + i) : 0;
      const uint32_t high = valid && chunk * 8 + i + 1 < head_dim ? dev::ldg(row + chunk * 8 + i + 1) : 0;
      dev::sts_u32(to + i * 2, low | high << 16);
    }
  }
}

// The same for floats: elements 4 chunk to 4 chunk + 3. If not ALIGNED, they are copied one by one; the copy is
// asynchronous in both cases.
template <bool ALIGNED> DK_DEVICE void copy_chunk(uint32_t to, const float* row, int chunk, int head_dim, bool valid) {
  if constexpr (ALIGNED) {
    dev::cp_async16(to, row + chunk * 4, valid && chunk * 4 < head_dim);
  } else {
    DK_UNROLL_FOR (int i = 0; i < 4; ++i)
      dev::cp_async4(to + i * 4, row + chunk * 4 + i, valid && chunk * 4 + i < head_dim);
  }
}

// Writes elements 8 chunk to 8 chunk + 7 of a row, those below head_dim.
template <bool ALIGNED> DK_DEVICE void store_chunk(uint16_t* row, int chunk, int head_dim, dev::u32x4 elements) {
  if constexpr (ALIGNED) {
    if (chunk * 8 < head_dim) dev::stg16(row + chunk * 8, elements);
  } else {
    const uint32_t pairs[4] = {elements.x, elements.y, elements.z, elements.w};
    DK_UNROLL_FOR (int i = 0; i < 8; ++i)
      if (chunk * 8 + i < head_dim) dev::stg(row + chunk * 8 + i, static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16));
  }
}

// The distribution of ROWS rows of D elements over THREADS threads: each copies one chunk of COUNT rows.
template <int D, int ROWS, int THREADS> struct RowShare {
  static constexpr int STEP = THREADS / Tile<D>::CHUNKS, COUNT = ROWS / STEP;
  static_assert(ROWS % STEP == 0, "threads share the rows evenly");
  static DK_DEVICE int row(int i) { return dev::tid() / Tile<D>::CHUNKS + i * STEP; }
  static DK_DEVICE int chunk() { return dev::tid() % Tile<D>::CHUNKS; }
};

// Copies this thread's share of the rows `tokens` (-1: zeros) of a [N, head_dim] matrix to the tile at `to`.
template <bool ALIGNED, int D, int ROWS, int THREADS, int COUNT>
DK_DEVICE void copy_rows(uint32_t to, const uint16_t* base, int64_t stride, int head_dim,
                         const int32_t (&tokens)[COUNT]) {
  using Share = RowShare<D, ROWS, THREADS>;
  static_assert(COUNT == Share::COUNT, "one token for each row of the share");
  DK_UNROLL_FOR (int i = 0; i < COUNT; ++i) {
    const bool valid = tokens[i] >= 0;
    copy_chunk<ALIGNED>(to + Tile<D>::at(Share::row(i), Share::chunk()), base + (valid ? tokens[i] : 0) * stride,
                        Share::chunk(), head_dim, valid);
  }
}

// -- selecting an instance, on the host
// choose(integral_constant<int, D>) for the smallest padded head dim
template <class Choose> const char* with_head_dim(int64_t head_dim, const Choose& choose) {
  if (head_dim <= 32) return choose(std::integral_constant<int, 32>{});
  if (head_dim <= 64) return choose(std::integral_constant<int, 64>{});
  return choose(std::integral_constant<int, 128>{});
}
// choose(T{}) for a 16-bit element type
template <class Choose> const char* with_element(DType dtype, const Choose& choose) {
  return dtype == DType::bfloat16 ? choose(dev::BFloat16{}) : choose(dev::Float16{});
}
// Whether every row of a [B, H, N, head_dim] tensor of elements of `size` bytes allows 16-byte copies.
template <class Strides> bool rows_aligned(const void* p, const Strides& s, int64_t head_dim, int64_t size) {
  return (reinterpret_cast<uintptr_t>(p) | s.batch * size | s.head * size | s.token * size | head_dim * size) % 16 == 0;
}

}   // namespace dk
