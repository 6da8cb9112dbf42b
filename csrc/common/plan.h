// Reads the packed plan that dalle_kernels/plan.py writes (the format is described there).
#pragma once
#include <cstdint>

namespace dk {

// Words of the header; dalle_kernels/plan.py has the same list.
namespace plan_header {
enum PlanHeader : int {
  magic = 0,
  version = 1,
  n = 2,
  rows = 3,
  columns = 4,
  tiles = 5,
  entries = 6,
  gathered = 7,
  masks = 8,
  items = 9,
  partials = 10,
  split_tiles = 11,
  most_columns = 12,
  rows_at = 13,
  begin_at = 14,
  entries_at = 15,
  gathered_at = 16,
  masks_at = 17,
  items_at = 18,
  split_tiles_at = 19,
  length = 20,
  text_len = 21,
  first = 22,
};
}   // namespace plan_header

struct Plan {
  explicit Plan(const int32_t* packed) : p(packed) {}
  static constexpr int32_t MAGIC = 0x4b50444b, VERSION = 3;
  static constexpr int HEADER_WORDS = 24, ENTRY_WORDS = 4, ITEM_WORDS = 4, SPLIT_WORDS = 3;

  int32_t operator[](plan_header::PlanHeader word) const { return p[word]; }
  int32_t tiles() const { return p[plan_header::tiles]; }
  // token of each tile row, -1 = padding
  const int32_t* rows(int64_t tile) const { return p + p[plan_header::rows_at] + tile * p[plan_header::rows]; }
  // first entry of a tile
  int32_t begin(int64_t tile) const { return p[p[plan_header::begin_at] + tile]; }

  // A run of key groups. `keys` >= 0 is the first token of consecutive groups; otherwise ~keys is the first gathered
  // group. mask -1: all pairs are allowed.
  struct Entry {
    int32_t keys, groups, mask;
  };
  Entry entry(int64_t i) const {
    const int32_t* e = p + p[plan_header::entries_at] + ENTRY_WORDS * i;
    return {e[0], e[1], e[2]};
  }
  const int32_t* gather(int64_t group) const {
    return p + p[plan_header::gathered_at] + group * p[plan_header::columns];
  }
  const uint32_t* mask(int64_t index) const {   // a word per 32 tile rows and key of the group, one bit per row
    return reinterpret_cast<const uint32_t*>(p) + p[plan_header::masks_at] +
           index * p[plan_header::columns] * (p[plan_header::rows] / 32);
  }

  // A work item: entries [begin, end) of a tile. partial is -1 if the item is the whole tile, else the index of its
  // partial result.
  struct Item {
    int32_t tile, begin, end, partial;
  };
  Item item(int64_t i) const {
    const int32_t* w = p + p[plan_header::items_at] + ITEM_WORDS * i;
    return {w[0], w[1], w[2], w[3]};
  }

  // The partial results [first, first + count) are merged into a tile.
  struct SplitTile {
    int32_t tile, first, count;
  };
  SplitTile split_tile(int64_t i) const {
    const int32_t* w = p + p[plan_header::split_tiles_at] + SPLIT_WORDS * i;
    return {w[0], w[1], w[2]};
  }

  const int32_t* p;
};

}   // namespace dk
