"""Loads and stores rows of a [batch, heads, tokens, head dim] tensor whose last dimension is contiguous."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Matrices(NamedTuple):
    """A tensor as a kernel argument: its data and three strides in elements."""

    data: torch.Tensor
    batch: int
    head: int
    token: int

    @classmethod
    def of(cls, tensor):
        return cls(tensor, *tensor.stride()[:3])


@triton.jit
def _pointers(matrices, heads, bh, tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Pointers to the rows `tokens`, [len(tokens), D], and the mask of the elements that exist."""
    matrix = matrices.data + (bh // heads).to(tl.int64) * matrices.batch + (bh % heads).to(tl.int64) * matrices.head
    d = tl.arange(0, D)
    pointers = matrix + tokens.to(tl.int64)[:, None] * matrices.token + d[None, :]
    return pointers, (tokens >= 0)[:, None] & (d < HEAD_DIM)[None, :]


@triton.jit
def load_rows(matrices, heads, bh, tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Rows `tokens` of matrix bh (of batch * heads), [len(tokens), D]; zeros for token -1 and beyond HEAD_DIM."""
    pointers, mask = _pointers(matrices, heads, bh, tokens, HEAD_DIM, D)
    return tl.load(pointers, mask, 0.0)


@triton.jit
def store_rows(matrices, heads, bh, tokens, x, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Stores x [len(tokens), D] as rows `tokens` of matrix bh; token -1 and columns beyond HEAD_DIM are skipped."""
    pointers, mask = _pointers(matrices, heads, bh, tokens, HEAD_DIM, D)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask)
