"""Reads a packed plan in a kernel (dalle_kernels/plan.py describes it); `plan` is a pointer to its first word.

Every entry is one group: plans are compiled with longest_run=1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...plan import PlanHeader

# Words of the header that say where a part begins.
ROWS_AT = tl.constexpr(int(PlanHeader.ROWS_AT))
ENTRIES_AT = tl.constexpr(int(PlanHeader.ENTRIES_AT))
GATHERED_AT = tl.constexpr(int(PlanHeader.GATHERED_AT))
MASKS_AT = tl.constexpr(int(PlanHeader.MASKS_AT))
ITEMS_AT = tl.constexpr(int(PlanHeader.ITEMS_AT))
SPLIT_TILES_AT = tl.constexpr(int(PlanHeader.SPLIT_TILES_AT))


@triton.jit
def work_item(plan, i):
    """(tile, first entry, end, partial) of work item i; partial -1: these are all entries of the tile."""
    at = plan + tl.load(plan + ITEMS_AT) + 4 * i
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def split_tile(plan, i):
    """(tile, first, count): the partial results [first, first + count) make up a tile."""
    at = plan + tl.load(plan + SPLIT_TILES_AT) + 3 * i
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def row_tokens(plan, tile, ROWS: tl.constexpr):
    """The tokens of a tile's rows [ROWS]; -1 = padding."""
    return tl.load(plan + tl.load(plan + ROWS_AT) + tile * ROWS + tl.arange(0, ROWS))


@triton.jit
def parts(plan):
    """Where the entries, the gathered groups and the masks begin."""
    return plan + tl.load(plan + ENTRIES_AT), plan + tl.load(plan + GATHERED_AT), plan + tl.load(plan + MASKS_AT)


@triton.jit
def read_entry(entries, gathered, e, COLUMNS: tl.constexpr):
    """(tokens [COLUMNS], mask) of entry e: which tokens its columns are, -1 = padding, and the number of the mask that
    says which pairs are allowed, -1: all.
    """
    keys, mask = tl.load(entries + 4 * e), tl.load(entries + 4 * e + 2)
    column, is_gathered = tl.arange(0, COLUMNS), tl.full([COLUMNS], keys, tl.int32) < 0
    listed = tl.load(gathered + ~keys * COLUMNS + column, is_gathered, 0)
    return tl.where(is_gathered, listed, keys + column), mask


@triton.jit
def where_allowed(x, other, masks, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] where mask number `mask` allows the pair, else `other`. A word has the bits of 32 rows of a
    column.
    """
    row = tl.arange(0, ROWS)[:, None]
    words_at = masks + mask * (ROWS // 32 * COLUMNS) + tl.arange(0, COLUMNS)
    words = tl.load(words_at)[None, :]
    for i in tl.static_range(1, ROWS // 32):
        words = tl.where(row < 32 * i, words, tl.load(words_at + i * COLUMNS)[None, :])
    return tl.where((words >> row % 32) & 1 != 0, x, other)
