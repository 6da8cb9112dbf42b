"""Plans: a pattern compiled for a tile shape. This module is device-independent; backends choose the tile shape and
upload plans.

A kernel processes tiles of `rows` queries and groups of `columns` keys. For every tile the plan lists the groups to
read: runs of consecutive keys that every row of the tile attends to, and gathered groups of the other keys that any of
its rows needs, with a bit mask if not all pairs are allowed. A plan is one int32 tensor, in the same format for every
backend. Its sections begin at multiples of four words:

    header [24]    magic, version, n, rows, columns, tiles, entries, gathered groups, masks, work items, partial
                   results, split tiles, the most columns of any tile, the offset of each of the following sections,
                   total length, text_len, first query; the rest is 0
    tile rows      [tiles, rows]        token of each row, -1 where the tile is not full
    tile begin     [tiles + 1]          first entry of each tile
    entries        [entries, 4]         keys, groups, mask, live: `keys` >= 0 is the first token of `groups` consecutive
                                        groups; else ~keys is the first of `groups` gathered groups; mask -1 means every
                                        pair is allowed; bit (r * ceil(columns / 16) + c) of `live` says whether rows
                                        16 r to 16 r + 15 and columns 16 c to 16 c + 15 share an allowed pair
    gathered       [groups, columns]    tokens, -1 where the group is not full
    masks          [masks, rows / 32, columns]   one bit per row, lowest first; equal masks are stored once
    work items     [items, 4]           tile, first entry, end, partial: the work of one GPU block or CPU thread, in
                                        longest-processing-time-first order; `partial` is -1 if the item is the whole
                                        tile, else the index of its partial result
    split tiles    [split, 3]           tile, first partial, partials, which are merged in this order

With `side="key"` rows are keys and columns are the queries that attend to them, so that in a backward pass one work
item owns its dK and dV. Plans are compiled by streaming over tiles; no N x N matrix is ever created.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np

from .patterns import AttentionPattern

MAGIC, VERSION, HEADER_WORDS = 0x4B50444B, 3, 24
Side = Literal["query", "key"]


class PlanHeader(IntEnum):
    """Words of the header; csrc/common/plan.h has the same list."""

    MAGIC = 0
    VERSION = 1
    N = 2
    ROWS = 3
    COLUMNS = 4
    TILES = 5
    ENTRIES = 6
    GATHERED = 7
    MASKS = 8
    ITEMS = 9
    PARTIALS = 10
    SPLIT_TILES = 11
    MOST_COLUMNS = 12
    ROWS_AT = 13
    BEGIN_AT = 14
    ENTRIES_AT = 15
    GATHERED_AT = 16
    MASKS_AT = 17
    ITEMS_AT = 18
    SPLIT_TILES_AT = 19
    LENGTH = 20
    TEXT_LEN = 21
    FIRST = 22


@dataclass(frozen=True)
class TileShape:
    """The tile shape of a plan, and how it splits long tiles.

    Attributes:
        rows: rows per tile, a multiple of 32.
        columns: columns per group.
        longest_run: maximum groups per entry; None: unlimited.
        split: number of groups after which a tile is split into several work items; None: never.
        max_splits: the split size is at least total groups // max_splits, which bounds the number of partial results
            and with it the scratch memory; None: no bound.
    """

    rows: int = 32
    columns: int = 8
    longest_run: int | None = None
    split: int | None = None
    max_splits: int | None = None


@dataclass(frozen=True)
class Plan:
    """A compiled plan. Kernels read `packed`; the other attributes are views of it, for tests and inspection."""

    packed: np.ndarray
    rows: np.ndarray
    begin: np.ndarray
    entries: np.ndarray
    gathered: np.ndarray
    masks: np.ndarray
    items: np.ndarray
    split_tiles: np.ndarray

    @property
    def pairs(self) -> int:
        """Number of (row, column) pairs that a kernel computes; at least the pattern's nnz."""
        return int(self.entries[:, 1].sum()) * self.gathered.shape[1] * self.rows.shape[1]


def compile_plan(
    pattern: AttentionPattern, n: int, shape: TileShape = TileShape(), side: Side = "query", first: int = 0
) -> Plan:
    """Compiles the first `n` tokens of `pattern` for tiles of `shape`. The rows of tiles are queries or, with
    side="key", keys. The queries are the tokens from `first` on, the keys all tokens.

    Raises:
        ValueError: the plan is too large for int32.
    """
    order = pattern.order().numpy()
    order = order[order < n].astype(np.int32)
    listed = order[order >= first] if side == "query" else order
    tiles = -(-len(listed) // shape.rows)
    rows = np.full(tiles * shape.rows, -1, np.int32)
    rows[: len(listed)] = listed
    rows = rows.reshape(tiles, shape.rows)
    builder = _Builder(shape, np.argsort(order))
    for tile in rows:
        builder.add_tile(*_tile_block(pattern, n, tile[tile >= 0], side, first))
    return builder.finish(rows, {"N": n, "FIRST": first, "TEXT_LEN": pattern.text_len})


def _tile_block(pattern, n, tokens, side, first):
    """The columns that a tile's tokens may need, and the allowed pairs, bool [tokens, columns]."""
    if side == "query":
        columns = np.arange(tokens.max() + 1 if pattern.is_causal else n, dtype=np.int32)
        return columns, pattern.allowed(tokens[:, None], columns[None, :])
    columns = np.arange(max(tokens.min(), first) if pattern.is_causal else first, n, dtype=np.int32)
    return columns, pattern.allowed(columns[None, :], tokens[:, None])


class _Builder:
    def __init__(self, shape, rank):
        self.shape, self.rank = shape, rank
        self.entries, self.begin, self.gathered, self.masks = [], [0], [], []
        self.mask_index = {}
        self.most_columns = 0

    def add_tile(self, columns, block):
        full = block.all(0)
        in_run = self._add_runs(columns, full, len(block))
        rest = np.flatnonzero(block.any(0) & ~in_run)
        rest = rest[np.argsort(self.rank[columns[rest]])]  # the pattern's order puts related columns next to each other
        for start in range(0, len(rest), self.shape.columns):
            part = rest[start : start + self.shape.columns]
            self._add_gathered(columns[part], block[:, part])
        groups = sum(entry[1] for entry in self.entries[self.begin[-1] :])
        self.most_columns = max(self.most_columns, groups * self.shape.columns)
        self.begin.append(len(self.entries))

    def _add_runs(self, columns, full, rows):
        """Stores runs of consecutive full columns, in whole groups; returns a mask of the columns that they cover."""
        size, covered = self.shape.columns, np.zeros(len(full), bool)
        live = self._live(np.ones((rows, size), bool))
        edges = np.flatnonzero(np.diff(np.concatenate([[0], full.view(np.int8), [0]])))
        for begin, end in edges.reshape(-1, 2):
            groups = (end - begin) // size
            covered[begin : begin + groups * size] = True
            longest = self.shape.longest_run or max(groups, 1)
            for first in range(0, groups, longest):
                key = int(columns[begin]) + first * size
                self.entries.append((key, min(longest, groups - first), -1, live))
        return covered

    def _add_gathered(self, tokens, block):
        group = np.full(self.shape.columns, -1, np.int32)
        group[: len(tokens)] = tokens
        padded = np.zeros((self.shape.columns, self.shape.rows), bool)
        padded[: len(tokens), : len(block)] = block.T
        words = np.ascontiguousarray(np.packbits(padded, axis=1, bitorder="little").view("<u4").T)
        mask = -1 if padded.all() else self.mask_index.setdefault(words.tobytes(), len(self.masks))
        if mask == len(self.masks):
            self.masks.append(words)
        self.entries.append((~len(self.gathered), 1, mask, self._live(block)))
        self.gathered.append(group)

    def _live(self, block):
        """One bit per 16 x 16 block of a group, set if the block has an allowed pair; int32."""
        across = -(-self.shape.columns // 16)
        rows, columns = np.nonzero(block)
        bits = np.bitwise_or.reduce(1 << (rows // 16 * across + columns // 16), initial=0)
        return int(np.uint32(bits).astype(np.int32))

    def _items(self):
        """(work items, longest processing time first; split tiles; number of partial results)."""
        items, split = [], []
        partials = 0
        groups = np.cumsum([0] + [entry[1] for entry in self.entries])  # before each entry
        size = self.shape.split or groups[-1]
        if self.shape.max_splits:
            size = max(size, groups[-1] // self.shape.max_splits)
        for tile, (begin, end) in enumerate(zip(self.begin, self.begin[1:])):
            chunk = (groups[begin:end] - groups[begin]) // size  # of each entry
            first = [begin + int(i) for i in np.flatnonzero(np.diff(chunk, prepend=-1))]
            chunks = list(zip(first, [*first[1:], end]))
            if len(chunks) == 1:
                items.append((tile, begin, end, -1))
                continue
            items += [(tile, *chunk, partials + i) for i, chunk in enumerate(chunks)]
            split.append((tile, partials, len(chunks)))
            partials += len(chunks)
        items.sort(key=lambda item: groups[item[1]] - groups[item[2]])
        return items, split, partials

    def finish(self, rows, facts):
        shape = self.shape
        items, split, partials = self._items()
        parts = {
            "rows": rows,
            "begin": np.array(self.begin, np.int32),
            "entries": np.array(self.entries, np.int32).reshape(-1, 4),
            "gathered": np.array(self.gathered, np.int32).reshape(-1, shape.columns),
            "masks": np.array(self.masks, "<u4").reshape(-1, shape.rows // 32, shape.columns),
            "items": np.array(items, np.int32).reshape(-1, 4),
            "split_tiles": np.array(split, np.int32).reshape(-1, 3),
        }
        offsets = HEADER_WORDS + np.cumsum([0] + [-(-part.size // 4) * 4 for part in parts.values()])
        if offsets[-1] >= 2**31:
            raise ValueError(
                f"the plan of this pattern over {facts['N']} tokens needs {offsets[-1]} words, more than int32 can "
                "address; use a sparser pattern"
            )
        packed = np.zeros(offsets[-1], np.int32)
        header = {
            **facts, "MAGIC": MAGIC, "VERSION": VERSION, "ROWS": shape.rows, "COLUMNS": shape.columns,
            "TILES": len(rows), "ENTRIES": len(self.entries), "GATHERED": len(self.gathered), "MASKS": len(self.masks),
            "ITEMS": len(items), "PARTIALS": partials, "SPLIT_TILES": len(split), "MOST_COLUMNS": self.most_columns,
            "LENGTH": offsets[-1], **{f"{name.upper()}_AT": offset for name, offset in zip(parts, offsets)},
        }  # fmt: skip
        for name, value in header.items():
            packed[PlanHeader[name]] = value
        views = {}
        for (name, part), offset in zip(parts.items(), offsets):
            packed[offset : offset + part.size] = part.reshape(-1).view(np.int32)
            views[name] = packed[offset : offset + part.size].reshape(part.shape)
        return Plan(packed=packed, **views)
