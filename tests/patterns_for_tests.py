"""One small pattern of every kind, for the tests of all operations."""

import torch

import dalle_kernels as dk


def random_mask(n, generator=None):
    """A causal mask in which every token attends to itself and about a third of the tokens before it."""
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


NAMES = tuple(every_pattern(1, (2, 2)))
