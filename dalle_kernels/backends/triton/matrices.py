"""The rows of a [batch, heads, tokens, head dim] tensor of any strides with a contiguous last dimension."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Matrices(NamedTuple):
    """A tensor as kernels take it: its data, and three strides in elements."""

    data: torch.Tensor
    batch: int
    head: int
    token: int

    @classmethod
    def of(cls, tensor):
        return cls(tensor, *tensor.stride()[:3])


@triton.jit
def _places(matrices, heads, bh, tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    matrix = matrices.data + (bh // heads).to(tl.int64) * matrices.batch + (bh % heads).to(tl.int64) * matrices.head
    d = tl.arange(0, D)
    places = matrix + tokens.to(tl.int64)[:, None] * matrices.token + d[None, :]
    return places, (tokens >= 0)[:, None] & (d < HEAD_DIM)[None, :]


@triton.jit
def load_rows(matrices, heads, bh, tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """The rows `tokens` of matrix number bh (of batch * heads), [len(tokens), D]; zeros for token -1 and from HEAD_DIM
    on.
    """
    places, there = _places(matrices, heads, bh, tokens, HEAD_DIM, D)
    return tl.load(places, there, 0.0)


@triton.jit
def store_rows(matrices, heads, bh, tokens, x, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    places, there = _places(matrices, heads, bh, tokens, HEAD_DIM, D)
    tl.store(places, x.to(places.dtype.element_ty), there)
