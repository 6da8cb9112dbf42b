"""The plans, fake kernels and gradient of sparse_attention, shared by the registered backends."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch._ops import OpOverload

from ...compile import constant_result, lifted
from ..base import rows_contiguous
from ..plans import Tiles, plan_tensors
from . import differentiable


def fake(q, *inputs):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def fake_backward(grad_out, q, k, v, *inputs):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    q, k, v, plan, backward_plan, ctx.sizes, ctx.scale, text_lengths, seed, ctx.dropout_p, ctx.head_offset = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, plan, backward_plan, text_lengths, seed)


def register_autograd(
    op: OpOverload, backward_op: OpOverload, tiles: Callable[[torch.device, int, torch.dtype], Tiles]
) -> Callable:
    """Registers `backward_op` as the gradient of `op`. Returns the backend's function, which takes checked arguments.

    Args:
        op, backward_op: as in csrc/ops/schemas.cpp.
        tiles: (device, head dim, dtype) -> the tile shapes of the plans.
    """

    def backward(gradient, ctx, grad_out, grad_lse):  # the log-sum-exp is not differentiable
        *tensors, text_lengths, seed = ctx.saved_tensors
        options = text_lengths, seed, ctx.dropout_p, ctx.head_offset
        grad_inputs = gradient(rows_contiguous(grad_out), *tensors, ctx.sizes, ctx.scale, *options)
        return *grad_inputs, *(None,) * 8

    attend = differentiable(op, backward_op, _setup_context, backward)

    @constant_result
    def plans(pattern, n, first, device, head_dim, dtype):
        return plan_tensors(pattern, n, device, tiles(device, head_dim, dtype), first)

    def sparse_attention(q, k, v, pattern, scale, options):
        # index(): a plan is for one length, even with dynamic shapes
        n = operator.index(k.shape[2])
        plan, backward_plan, sizes = plans(
            pattern, n, n - operator.index(q.shape[2]), q.device, q.shape[3], q.dtype
        )
        return attend(q, k, v, *lifted(plan, backward_plan), sizes, scale, *options)

    return sparse_attention
