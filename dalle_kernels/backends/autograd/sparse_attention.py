"""The plans, fake kernels and gradient of sparse_attention, shared by the registered backends."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch._ops import OpOverload

from ...compile import constant_result
from ..base import rows_contiguous
from ..plans import Tiles, plan_tensors


def fake(q, k, v, plan, backward_plan, sizes, scale):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def fake_backward(grad_out, q, k, v, out, lse, plan, backward_plan, sizes, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    *tensors, plan, backward_plan, ctx.sizes, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse, plan, backward_plan)


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "sparse_attention has no double backward; use backend='reference' where second derivatives are needed"
    )


def register_autograd(
    op: OpOverload, backward_op: OpOverload, tiles: Callable[[torch.device, int, torch.dtype], Tiles]
) -> Callable:
    """Registers `backward_op` as the gradient of `op`. Returns the backend's function, which takes checked arguments.

    Args:
        op, backward_op: as in csrc/ops/schemas.cpp.
        tiles: (device, head dim, dtype) -> the tile shapes of the plans.
    """

    class SparseAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = op(*inputs)
            _setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            grad_out, _ = grads  # the log-sum-exp is not differentiable
            grad_inputs = backward_op(rows_contiguous(grad_out), *ctx.saved_tensors, ctx.sizes, ctx.scale)
            return *grad_inputs, None, None, None, None

    torch.library.register_autograd(op.name(), SparseAttention.backward, setup_context=_setup_context)
    torch.library.register_autograd(backward_op.name(), _no_double_backward)

    @constant_result
    def plans(pattern, n, device, head_dim, dtype):
        return plan_tensors(pattern, n, device, tiles(device, head_dim, dtype))

    def sparse_attention(q, k, v, pattern, scale):
        # index(): a plan is for one length, even with dynamic shapes
        plan, backward_plan, sizes = plans(pattern, operator.index(q.shape[2]), q.device, q.shape[3], q.dtype)
        # In eager mode the autograd.Function is 60 microseconds faster than the operation's registered Python autograd.
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        eager = needs_grad and not torch.compiler.is_compiling()
        return (SparseAttention.apply if eager else op)(q, k, v, plan, backward_plan, sizes, scale)

    return sparse_attention
