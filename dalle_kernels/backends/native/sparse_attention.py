"""Registers dalle_kernels::sparse_attention (schema in csrc/ops/schemas.cpp): fake kernels and autograd."""

from __future__ import annotations

import operator

import torch

from ...compile import constant_result
from ...plan import plan_tensors
from .. import sparse_attention as shared

_op = torch.ops.dalle_kernels.sparse_attention.default
_backward_op = torch.ops.dalle_kernels.sparse_attention_backward.default


@constant_result
def _plans(pattern, n, device):
    return plan_tensors(pattern, n, device)


def sparse_attention(q, k, v, pattern, scale):
    """(out, lse) of already checked tensors."""
    q, k, v = (shared.rows_contiguous(x) for x in (q, k, v))
    # index(): a plan is for one length, also under dynamic shapes
    plan, backward_plan, sizes = _plans(pattern, operator.index(q.shape[2]), q.device)
    # torch.compile traces the operation itself; its autograd in Python takes 60 microseconds longer than a Function's
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    eager = needs_grad and not torch.compiler.is_compiling()
    return (_Function.apply if eager else _op)(q, k, v, plan, backward_plan, sizes, scale)


torch.library.register_fake("dalle_kernels::sparse_attention", shared.fake)
torch.library.register_fake("dalle_kernels::sparse_attention_backward", shared.fake_backward)
_Function = shared.register_autograd(_op, _backward_op)
