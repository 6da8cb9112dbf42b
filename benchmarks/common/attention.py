"""Problems of sparse_attention with random inputs, and FlexAttention on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import dalle_kernels as dk

from .timing import Unavailable, compiled

P = dk.AttentionPattern
PATTERNS = {"row": P.row, "column": P.column, "conv": P.conv}


@dataclass(frozen=True)
class Case:
    pattern: str
    direction: str
    text: int = 256
    grid: tuple[int, int] = (32, 32)
    dim: int = 64
    batch: int = 16
    heads: int = 16
    dtype: str = "bfloat16"

    def __str__(self):
        grid = "x".join(map(str, self.grid))
        return f"attention {self.direction} {self.pattern} {grid} dim {self.dim} batch {self.batch} {self.dtype}"


def shrink(case):
    return replace(case, text=4, grid=(4, 4), dim=16, batch=1, heads=2, dtype="float32")


class Inputs:
    """Random q, k, v of a case. `function` binds an attention, or its backward pass, to them."""

    def __init__(self, case, device, autograd=False):
        self.case = case
        self.pattern = PATTERNS[case.pattern](case.text, case.grid)
        shape = case.batch, case.heads, self.pattern.seq_len, case.dim
        self.backward = case.direction == "backward"
        dtype = getattr(torch, case.dtype)
        make = dict(device=device, dtype=dtype)
        self.tensors = [torch.randn(shape, **make).requires_grad_(self.backward or autograd) for _ in range(3)]
        self.grad = torch.randn(shape, **make) if self.backward else None

    def function(self, attention):
        if self.backward:
            out = attention(*self.tensors)
            return lambda: torch.autograd.grad(out, self.tensors, self.grad, retain_graph=True)
        if self.tensors[0].requires_grad:
            return lambda: attention(*self.tensors)

        @torch.inference_mode()
        def forward():
            return attention(*self.tensors)

        return forward


def in_order(pattern):
    """The pattern after reordering the tokens by pattern.order(): column becomes axial_row of the transposed grid."""
    if pattern.name != "column":
        return pattern
    return P.axial_row(pattern.text_len, pattern.grid[::-1])


def flex(inputs, order, block, setting):
    pattern = in_order(inputs.pattern) if order == "ordered" else inputs.pattern
    n = pattern.seq_len
    mask = create_block_mask(pattern.mask_mod, None, None, n, n, device=setting.device, BLOCK_SIZE=block)
    if inputs.backward and not setting.on_gpu:
        raise Unavailable("has no backward pass on a CPU")
    function = flex_attention if setting.tiny else compiled(flex_attention)
    return inputs.function(lambda q, k, v: function(q, k, v, block_mask=mask))
