"""Registers dalle_kernels::sparse_attention (schema in csrc/ops/schemas.cpp): fake kernels and autograd."""

from __future__ import annotations

import operator

import torch

from ...plan import plan_tensors

_op = torch.ops.dalle_kernels.sparse_attention.default
_backward_op = torch.ops.dalle_kernels.sparse_attention_backward.default


@torch.compiler.assume_constant_result
def _plans(pattern, n, device):
    return plan_tensors(pattern, n, device)


def sparse_attention(q, k, v, pattern, scale):
    """(out, lse) of already checked tensors."""
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    # index(): a plan is for one length, also under dynamic shapes
    plan, backward_plan, sizes = _plans(pattern, operator.index(q.shape[2]), q.device)
    # torch.compile traces the operation itself; its autograd in Python takes 60 microseconds longer than a Function's
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    eager = needs_grad and not torch.compiler.is_compiling()
    return (_SparseAttention.apply if eager else _op)(q, k, v, plan, backward_plan, sizes, scale)


def _rows_contiguous(x):
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.register_fake("dalle_kernels::sparse_attention")
def _(q, k, v, plan, backward_plan, sizes, scale):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("dalle_kernels::sparse_attention_backward")
def _(grad_out, q, k, v, out, lse, plan, backward_plan, sizes, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    *tensors, plan, backward_plan, ctx.sizes, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse, plan, backward_plan)


def _backward(ctx, grad_out, grad_lse):
    grads = _backward_op(_rows_contiguous(grad_out), *ctx.saved_tensors, ctx.sizes, ctx.scale)
    return *grads, None, None, None, None


class _SparseAttention(torch.autograd.Function):
    """The operation with the same autograd, for eager mode."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _op(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "sparse_attention has no double backward; use backend='reference' where second derivatives are needed"
    )


torch.library.register_autograd("dalle_kernels::sparse_attention", _backward, setup_context=_setup_context)
torch.library.register_autograd("dalle_kernels::sparse_attention_backward", _no_double_backward)
