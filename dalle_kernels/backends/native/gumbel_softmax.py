"""Registers dalle_kernels::gumbel_softmax (schema in csrc/ops/schemas.cpp): fake kernels and autograd."""

from __future__ import annotations

import torch

_op = torch.ops.dalle_kernels.gumbel_softmax.default
_backward_op = torch.ops.dalle_kernels.gumbel_softmax_backward.default


def gumbel_softmax(logits, seed, tau, hard, dim, return_kl):
    """(y, kl or None) of already checked arguments."""
    # A tensor that torch.compile can compute from a changing tau, where a float argument would compile anew for each.
    tau = torch.ones((), dtype=torch.float32, device=logits.device) * tau
    y, kl, _ = _op(logits, seed, tau, hard, dim, return_kl)
    return y, kl if return_kl else None


def _empty_like(x, dim):
    """In the layout of the operations' outputs: contiguous, but the CPU keeps classes that lie last in memory there."""
    if x.device.type == "cpu" and x.movedim(dim, -1).is_contiguous():
        return torch.empty_like(x)
    return x.new_empty(x.shape)


@torch.library.register_fake("dalle_kernels::gumbel_softmax")
def _(logits, seed, tau, hard, dim, return_kl):
    rows = [*logits.shape[:dim], *logits.shape[dim + 1 :]]
    kl, stats = (rows, [2, *rows]) if return_kl else ([0], [0])
    y = _empty_like(logits, dim)
    return y, logits.new_empty(kl, dtype=torch.float32), logits.new_empty(stats, dtype=torch.float32)


@torch.library.register_fake("dalle_kernels::gumbel_softmax_backward")
def _(grad_y, grad_kl, y, logits, kl, stats, seed, tau, hard, dim):
    return _empty_like(logits if y is None else y, dim)


def _setup_context(ctx, inputs, output):
    logits, seed, tau, ctx.hard, ctx.dim, ctx.return_kl = inputs
    y, kl, stats = output
    ctx.mark_non_differentiable(stats)
    # Only what the gradient needs is kept alive: y for the soft relaxation; the logits for the hard one, which draws
    # its noise again, and for the KL.
    needs_logits = ctx.hard or ctx.return_kl
    ctx.save_for_backward(
        None if ctx.hard else y,
        logits if needs_logits else None,
        kl if ctx.return_kl else None,
        stats if ctx.return_kl else None,
        seed,
        tau,
    )


def _backward(ctx, grad_y, grad_kl, grad_stats):
    grad_kl = grad_kl if ctx.return_kl else None
    grad = _backward_op(grad_y, grad_kl, *ctx.saved_tensors, ctx.hard, ctx.dim)
    return grad, None, None, None, None, None


def _no_double_backward(ctx, grad):
    raise NotImplementedError(
        "gumbel_softmax has no double backward; use backend='reference' where second derivatives are needed"
    )


torch.library.register_autograd("dalle_kernels::gumbel_softmax", _backward, setup_context=_setup_context)
torch.library.register_autograd("dalle_kernels::gumbel_softmax_backward", _no_double_backward)
