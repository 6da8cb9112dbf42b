"""One small pattern of every kind, shared by the tests of every operation; and how the CPU's plans cut them."""

import contextlib
from dataclasses import replace

import torch

import dalle_kernels as dk
from dalle_kernels.backends import plans
from dalle_kernels.backends.native.tiles import TILES


def random_mask(n, generator=None):
    """A causal mask in which every token sees itself and about a third of the tokens before it."""
    return (torch.rand(n, n, generator=generator) < 0.3).tril().fill_diagonal_(True)


def every_pattern(text_len, grid):
    """A dict of name -> pattern; the last is a random mask with a random order."""
    P = dk.AttentionPattern
    n = text_len + grid[0] * grid[1]
    return {
        "row": P.row(text_len, grid),
        "column": P.column(text_len, grid),
        "conv-wrap": P.conv(text_len, grid, kernel=3),
        "conv-clip": P.conv(text_len, grid, kernel=5, edge="clip"),
        "conv-torus": P.conv(text_len, grid, kernel=3, edge="torus"),
        "axial_row": P.axial_row(text_len, grid),
        "corner_conv": P.corner_conv(text_len, grid, kernel=3, dilation=2),
        "causal": P.causal(text_len, grid),
        "mask": P.from_mask(random_mask(n), text_len=text_len, order=torch.randperm(n).tolist()),
    }


@contextlib.contextmanager
def split_after(groups):
    """Within, the CPU's plans split a tile after so many groups of keys; None: as they always do, which is after more
    keys than small patterns have.
    """
    before = TILES["cpu"]
    if groups:
        TILES["cpu"] = plans.Tiles(replace(before.query, longest_run=1, split=groups, shares=None))
    try:
        yield
    finally:
        TILES["cpu"] = before


NAMES = tuple(every_pattern(1, (2, 2)))
