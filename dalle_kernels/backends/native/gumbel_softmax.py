"""Registers the fake kernels and autograd of dalle_kernels::gumbel_softmax (schema in csrc/ops/schemas.cpp)."""

from __future__ import annotations

import torch

from ..autograd import gumbel_softmax as shared


def _empty_like(x, dim):
    """An empty tensor in the layout of the outputs: contiguous; on the CPU, classes last if they are last in `x`."""
    if x.device.type == "cpu" and x.movedim(dim, -1).is_contiguous():
        return torch.empty_like(x)
    return x.new_empty(x.shape)


@torch.library.register_fake("dalle_kernels::gumbel_softmax")
def _(logits, seed, tau, hard, dim, return_kl):
    _, kl, stats = shared.fake(logits, seed, tau, hard, dim, return_kl)
    return _empty_like(logits, dim), kl, stats


@torch.library.register_fake("dalle_kernels::gumbel_softmax_backward")
def _(grad_y, grad_kl, y, logits, kl, stats, seed, tau, hard, dim):
    return _empty_like(logits if y is None else y, dim)


gumbel_softmax = shared.register_autograd(
    torch.ops.dalle_kernels.gumbel_softmax.default, torch.ops.dalle_kernels.gumbel_softmax_backward.default
)
