// Reads the packed plan that dalle_kernels/plan.py writes (the format is described there).
#pragma once
#include <cstdint>

namespace dk {

struct Plan {
  explicit Plan(const int32_t* packed) : p(packed) {}
  enum Field {
    MAGIC, VERSION, N, TILE_ROWS, GROUP_COLUMNS, TILES, ENTRIES, GATHERED, MASKS, ITEMS, PARTIALS, SPLIT_TILES, MOST_COLUMNS,
    ROWS_AT, BEGIN_AT, ENTRIES_AT, GATHER_AT, MASKS_AT, ITEMS_AT, SPLIT_AT, TOTAL
  };
  static constexpr int32_t MAGIC_VALUE = 0x4b50444b, VERSION_VALUE = 2;
  static constexpr int HEADER = 24, ENTRY_WORDS = 4, ITEM_WORDS = 4, SPLIT_WORDS = 3;

  int32_t operator[](Field field) const { return p[field]; }
  int32_t tiles() const { return p[TILES]; }
  const int32_t* rows(int64_t tile) const { return p + p[ROWS_AT] + tile * p[TILE_ROWS]; }   // token of each tile row, -1 = padding
  int32_t begin(int64_t tile) const { return p[p[BEGIN_AT] + tile]; }                         // first entry of a tile

  // A run of key groups: `keys` >= 0 is the first token of contiguous groups; otherwise ~keys is the first group in the gather list. mask -1: all pairs allowed.
  struct Entry {
    int32_t keys, groups, mask;
  };
  Entry entry(int64_t i) const {
    const int32_t* e = p + p[ENTRIES_AT] + ENTRY_WORDS * i;
    return {e[0], e[1], e[2]};
  }
  const int32_t* gather(int64_t group) const { return p + p[GATHER_AT] + group * p[GROUP_COLUMNS]; }
  const uint32_t* mask(int64_t index) const {   // per 32 tile rows and key of the group, one bit per row
    return reinterpret_cast<const uint32_t*>(p) + p[MASKS_AT] + index * p[GROUP_COLUMNS] * (p[TILE_ROWS] / 32);
  }

  // A work item: entries [begin, end) of a tile; partial -1: these are all, else the number of the item's partial result.
  struct Item {
    int32_t tile, begin, end, partial;
  };
  Item item(int64_t i) const {
    const int32_t* w = p + p[ITEMS_AT] + ITEM_WORDS * i;
    return {w[0], w[1], w[2], w[3]};
  }

  // The partial results [first, first + count) make up a tile.
  struct SplitTile {
    int32_t tile, first, count;
  };
  SplitTile split_tile(int64_t i) const {
    const int32_t* w = p + p[SPLIT_AT] + SPLIT_WORDS * i;
    return {w[0], w[1], w[2]};
  }

  const int32_t* p;
};

}  // namespace dk
