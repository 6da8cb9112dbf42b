"""Reads a packed plan in a kernel (format: dalle_kernels/plan.py). `plan` is a pointer to its first word.

Every entry is one group, because plans are compiled with longest_run=1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...plan import PlanHeader

# Words of the header with the offsets of the sections.
ROWS_AT = tl.constexpr(int(PlanHeader.ROWS_AT))
ENTRIES_AT = tl.constexpr(int(PlanHeader.ENTRIES_AT))
GATHERED_AT = tl.constexpr(int(PlanHeader.GATHERED_AT))
MASKS_AT = tl.constexpr(int(PlanHeader.MASKS_AT))
ITEMS_AT = tl.constexpr(int(PlanHeader.ITEMS_AT))
SPLIT_TILES_AT = tl.constexpr(int(PlanHeader.SPLIT_TILES_AT))


@triton.jit
def work_item(plan, i):
    """(tile, first entry, end, partial) of work item i; partial is -1 if the item is the whole tile."""
    at = plan + tl.load(plan + ITEMS_AT) + 4 * i
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def split_tile(plan, i):
    """(tile, first, count): the partial results [first, first + count) are merged into the tile."""
    at = plan + tl.load(plan + SPLIT_TILES_AT) + 3 * i
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def row_tokens(plan, tile, ROWS: tl.constexpr):
    """The tokens of a tile's rows [ROWS]; -1: padding."""
    return tl.load(plan + tl.load(plan + ROWS_AT) + tile * ROWS + tl.arange(0, ROWS))


@triton.jit
def sections(plan):
    """Pointers to the entries, the gathered groups and the masks."""
    return plan + tl.load(plan + ENTRIES_AT), plan + tl.load(plan + GATHERED_AT), plan + tl.load(plan + MASKS_AT)


@triton.jit
def read_entry(entries, gathered, e, COLUMNS: tl.constexpr):
    """(tokens [COLUMNS], mask) of entry e: the tokens of its columns (-1: padding), and the index of its mask (-1: all
    pairs are allowed).
    """
    keys, mask = tl.load(entries + 4 * e), tl.load(entries + 4 * e + 2)
    column, is_gathered = tl.arange(0, COLUMNS), tl.full([COLUMNS], keys, tl.int32) < 0
    listed = tl.load(gathered + ~keys * COLUMNS + column, is_gathered, 0)
    return tl.where(is_gathered, listed, keys + column), mask


@triton.jit
def where_allowed(x, other, masks, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] where mask number `mask` allows the pair, else `other`. A word holds the bits of 32 rows of one
    column.
    """
    row = tl.arange(0, ROWS)[:, None]
    words_at = masks + mask * (ROWS // 32 * COLUMNS) + tl.arange(0, COLUMNS)
    words = tl.load(words_at)[None, :]
    for i in tl.static_range(1, ROWS // 32):
        words = tl.where(row < 32 * i, words, tl.load(words_at + i * COLUMNS)[None, :])
    return tl.where((words >> row % 32) & 1 != 0, x, other)
