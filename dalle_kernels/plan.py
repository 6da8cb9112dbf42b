"""Plans: a pattern compiled for a machine.

A kernel works on tiles of `rows` queries and on groups of `columns` keys. The plan lists, for every tile, which groups
it must read: runs of consecutive keys that every row of the tile sees, and gathered groups of the other keys any of
its rows needs, with a bit mask where not all pairs are allowed. It is one int32 tensor (the format is the same for
every backend):

    header [16]    magic, version, n, rows, columns, tiles, entries, gathered groups, masks, where in the tensor each
                   of the following begins, total length, and the most columns of any tile
    tile rows      [tiles, rows]        token of each row, -1 where the tile is not full
    tile begin     [tiles + 1]          first entry of each tile
    entries        [entries, 3]         keys, groups, mask: `keys` >= 0 is the first token of `groups` consecutive
                                        groups; else ~keys is the first of `groups`
                                        gathered groups; mask -1 means every pair is allowed
    gathered       [groups, columns]    tokens, -1 where the group is not full
    masks          [masks, columns, rows / 32]   one bit per row, lowest first; equal masks are stored once

Seen from the key side (`side="key"`) rows are keys and columns are the queries that see them, which lets a backward
pass own its dK and dV. Plans are compiled by streaming over tiles; no N x N matrix is ever made.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from .patterns import AttentionPattern

MAGIC, VERSION, HEADER = 0x4B50444B, 1, 16


@dataclass(frozen=True)
class TileShape:
    """Rows per tile (a multiple of 32) and columns per group."""

    rows: int = 32
    columns: int = 8


@dataclass(frozen=True)
class Plan:
    """A compiled plan: `packed` is what kernels read, the rest are views of it for people and tests."""

    packed: np.ndarray
    rows: np.ndarray
    begin: np.ndarray
    entries: np.ndarray
    gathered: np.ndarray
    masks: np.ndarray

    @property
    def pairs(self) -> int:
        """Pairs of (row, column) a kernel computes; the pattern's nnz is the least possible."""
        return int(self.entries[:, 1].sum()) * self.gathered.shape[1] * self.rows.shape[1]


def compile_plan(pattern: AttentionPattern, n: int, shape: TileShape = TileShape(), side: str = "query") -> Plan:
    """Compiles `pattern`, cut to its first `n` tokens, for tiles of `shape`, seen from `side` ("query" or "key")."""
    order = pattern.order().numpy()
    order = order[order < n].astype(np.int32)
    tiles = -(-n // shape.rows)
    rows = np.full(tiles * shape.rows, -1, np.int32)
    rows[:n] = order
    rows = rows.reshape(tiles, shape.rows)
    builder = _Builder(shape)
    for tile in rows:
        builder.add_tile(*_tile_block(pattern, n, tile[tile >= 0], side))
    return builder.finish(n, rows)


def _tile_block(pattern, n, tokens, side):
    """The columns that a tile's tokens may need, and the bool block [tokens, columns] of which pairs are allowed."""
    if side == "query":
        columns = np.arange(tokens.max() + 1, dtype=np.int32)
        return columns, pattern.allowed(tokens[:, None], columns[None, :])
    columns = np.arange(tokens.min(), n, dtype=np.int32)
    return columns, pattern.allowed(columns[None, :], tokens[:, None])


class _Builder:
    def __init__(self, shape):
        self.shape = shape
        self.entries, self.begin, self.gathered, self.masks = [], [0], [], []
        self.mask_index = {}
        self.most_columns = 0

    def add_tile(self, columns, block):
        full = block.all(0)
        in_run = self._add_runs(columns, full)
        rest = np.flatnonzero(block.any(0) & ~in_run)
        for start in range(0, len(rest), self.shape.columns):
            part = rest[start : start + self.shape.columns]
            self._add_gathered(columns[part], block[:, part])
        groups = sum(entry[1] for entry in self.entries[self.begin[-1] :])
        self.most_columns = max(self.most_columns, groups * self.shape.columns)
        self.begin.append(len(self.entries))

    def _add_runs(self, columns, full):
        """Stores stretches of consecutive full columns, in whole groups; returns which columns they cover."""
        covered = np.zeros(len(full), bool)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], full.view(np.int8), [0]])))
        for begin, end in edges.reshape(-1, 2):
            groups = (end - begin) // self.shape.columns
            if groups:
                self.entries.append((int(columns[begin]), groups, -1))
                covered[begin : begin + groups * self.shape.columns] = True
        return covered

    def _add_gathered(self, tokens, block):
        group = np.full(self.shape.columns, -1, np.int32)
        group[: len(tokens)] = tokens
        padded = np.zeros((self.shape.columns, self.shape.rows), bool)
        padded[: len(tokens), : len(block)] = block.T
        words = np.packbits(padded, axis=1, bitorder="little").view("<u4")
        mask = -1 if padded.all() else self.mask_index.setdefault(words.tobytes(), len(self.masks))
        if mask == len(self.masks):
            self.masks.append(words)
        self.entries.append((~len(self.gathered), 1, mask))
        self.gathered.append(group)

    def finish(self, n, rows):
        shape = self.shape
        parts = {
            "rows": rows,
            "begin": np.array(self.begin, np.int32),
            "entries": np.array(self.entries, np.int32).reshape(-1, 3),
            "gathered": np.array(self.gathered, np.int32).reshape(-1, shape.columns),
            "masks": np.array(self.masks, "<u4").reshape(-1, shape.columns, shape.rows // 32),
        }
        offsets = HEADER + np.cumsum([0] + [part.size for part in parts.values()])
        if offsets[-1] >= 2**31:
            raise ValueError(
                f"the plan of this pattern over {n} tokens needs {offsets[-1]} words, more than int32 can address; "
                "use a sparser pattern"
            )
        packed = np.zeros(offsets[-1], np.int32)
        packed[:HEADER] = [
            MAGIC, VERSION, n, shape.rows, shape.columns, len(rows), len(self.entries), len(self.gathered),
            len(self.masks), *offsets, self.most_columns,
        ]  # fmt: skip
        views = {}
        for (name, part), offset in zip(parts.items(), offsets):
            packed[offset : offset + part.size] = part.reshape(-1).view(np.int32)
            views[name] = packed[offset : offset + part.size].reshape(part.shape)
        return Plan(packed=packed, **views)


@functools.lru_cache(maxsize=256)
def plan_tensor(
    pattern: AttentionPattern, n: int, device: torch.device, shape: TileShape = TileShape(), side: str = "query"
) -> torch.Tensor:
    """The packed plan as an int32 tensor on `device`; compiled once and cached."""
    if not 1 <= n <= pattern.seq_len:
        raise ValueError(f"n must lie in [1, {pattern.seq_len}], the pattern's length; got {n}")
    # An ordinary tensor, whatever the first use happens in: inference, which autograd could not save, or a trace.
    with torch.inference_mode(False), _disable_current_modes():
        return torch.from_numpy(compile_plan(pattern, n, shape, side).packed).to(device)
