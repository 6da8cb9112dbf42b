"""The fake kernels and the gradient of gumbel_softmax, shared by the registered backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._ops import OpOverload

from . import differentiable


def fake(logits, seed, tau, hard, dim, return_kl):
    """(y, kl, stats), contiguous; kl and stats are empty without return_kl."""
    rows = [*logits.shape[:dim], *logits.shape[dim + 1 :]]
    kl, stats = (rows, [2, *rows]) if return_kl else ([0], [0])
    y = logits.new_empty(logits.shape)
    return y, logits.new_empty(kl, dtype=torch.float32), logits.new_empty(stats, dtype=torch.float32)


def fake_backward(grad_y, grad_kl, y, logits, kl, stats, seed, tau, hard, dim):
    return grad_y.new_empty(grad_y.shape)


def _setup_context(ctx, inputs, output):
    logits, seed, tau, ctx.hard, ctx.dim, ctx.return_kl = inputs
    y, kl, stats = output
    ctx.mark_non_differentiable(stats)
    # Saves only what the gradient needs: y for the soft relaxation; the logits for the hard one, which regenerates its
    # noise, and for the KL.
    ctx.save_for_backward(
        None if ctx.hard else y,
        logits if ctx.hard or ctx.return_kl else None,
        kl if ctx.return_kl else None,
        stats if ctx.return_kl else None,
        seed,
        tau,
    )


def register_autograd(op: OpOverload, backward_op: OpOverload) -> Callable:
    """Registers `backward_op` as the gradient of `op`. Returns the backend's function: checked arguments -> (y, kl or
    None).
    """

    def backward(gradient, ctx, grad_y, grad_kl, grad_stats):
        grad_kl = grad_kl if ctx.return_kl else None
        grad = gradient(grad_y, grad_kl, *ctx.saved_tensors, ctx.hard, ctx.dim)
        return grad, None, None, None, None, None

    relax = differentiable(op, backward_op, _setup_context, backward)

    def gumbel_softmax(logits, seed, tau, hard, dim, return_kl):
        # A tensor, so that torch.compile does not recompile when tau changes; a float would be a constant of the graph.
        tau = torch.ones((), dtype=torch.float32, device=logits.device) * tau
        y, kl, _ = relax(logits, seed, tau, hard, dim, return_kl)
        return y, kl if return_kl else None

    return gumbel_softmax
