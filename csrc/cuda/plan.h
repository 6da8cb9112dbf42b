// Reads a packed plan (csrc/common/plan.h) from device memory. Tiles have 64 rows, groups COLUMNS columns, and every
// entry is one group.
#pragma once
#include "common/plan.h"
#include "cuda/device.h"

namespace dk {

constexpr int TILE_ROWS = 64;

template <int COLUMNS> struct DevicePlan {
  static constexpr int PARTS = COLUMNS / 16;   // 16 x 16 blocks across a group

  explicit DK_DEVICE DevicePlan(const int32_t* packed)
      : p(packed),
        rows_at(at(plan_header::rows_at)),
        entries_at(at(plan_header::entries_at)),
        gather_at(at(plan_header::gathered_at)),
        masks_at(at(plan_header::masks_at)) {}

  using Item = Plan::Item;
  DK_DEVICE Item item(int64_t i) const {
    const dev::u32x4 w = dev::ldg16(p + at(plan_header::items_at) + i * Plan::ITEM_WORDS);
    return {static_cast<int32_t>(w.x), static_cast<int32_t>(w.y), static_cast<int32_t>(w.z), static_cast<int32_t>(w.w)};
  }

  using SplitTile = Plan::SplitTile;
  DK_DEVICE SplitTile split_tile(int64_t i) const {
    const int32_t* words = p + at(plan_header::split_tiles_at) + i * Plan::SPLIT_WORDS;
    return {dev::ldg(words), dev::ldg(words + 1), dev::ldg(words + 2)};
  }

  // The token of row r; -1: padding
  DK_DEVICE int32_t row(int64_t tile, int r) const { return dev::ldg(p + rows_at + tile * TILE_ROWS + r); }

  struct Entry {
    int32_t keys, mask;
    uint32_t live;
    // bit c: columns 16 c to 16 c + 15
    DK_DEVICE uint32_t live_parts(int row_part) const { return live >> row_part * PARTS & ((1u << PARTS) - 1); }
  };
  DK_DEVICE Entry entry(int64_t i) const {
    const dev::u32x4 w = dev::ldg16(p + entries_at + i * Plan::ENTRY_WORDS);
    return {static_cast<int32_t>(w.x), static_cast<int32_t>(w.z), w.w};
  }
  // `keys` of an entry
  DK_DEVICE int32_t keys(int64_t i) const { return dev::ldg(p + entries_at + i * Plan::ENTRY_WORDS); }

  // Token of column `column` of the entry with these `keys`; -1: padding
  DK_DEVICE int32_t column(int32_t keys, int column) const {
    return keys >= 0 ? keys + column : dev::ldg(p + gather_at + static_cast<int64_t>(~keys) * COLUMNS + column);
  }

  // One word per half of the rows and column, with one bit per row; aligned to 16 bytes.
  DK_DEVICE const uint32_t* mask(int32_t mask) const {
    return reinterpret_cast<const uint32_t*>(p) + masks_at + static_cast<int64_t>(mask) * (TILE_ROWS / 32 * COLUMNS);
  }

  const int32_t* p;
  int32_t rows_at, entries_at, gather_at, masks_at;

 private:
  DK_DEVICE int32_t at(plan_header::PlanHeader word) const { return dev::ldg(p + word); }
};

}   // namespace dk
