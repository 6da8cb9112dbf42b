"""What every registered sparse_attention shares, whatever its kernels are written in: fake kernels and the gradient."""

from __future__ import annotations

import torch


def rows_contiguous(x):
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


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


def register_autograd(op, backward_op):
    """Gives `op` its gradient, `backward_op`; returns a Function of both, which eager mode calls with less overhead."""

    class SparseAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = op(*inputs)
            _setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, grad_out, grad_lse):
            grads = backward_op(rows_contiguous(grad_out), *ctx.saved_tensors, ctx.sizes, ctx.scale)
            return *grads, None, None, None, None

    torch.library.register_autograd(op.name(), SparseAttention.backward, setup_context=_setup_context)
    torch.library.register_autograd(backward_op.name(), _no_double_backward)
    return SparseAttention
