"""Gumbel-softmax over the vocabulary of the published dVAE (dim 1 of [B, 8192, 32, 32]) against F.gumbel_softmax."""

import pytest
import torch
from torch.nn.functional import gumbel_softmax

import dalle_kernels as dk

SHAPE, TAU = (2, 8192, 32, 32), 0.9
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@dtypes
def test_forward(versus, dtype):
    logits = torch.randn(SHAPE).to(getattr(torch, dtype))
    with torch.inference_mode():
        versus(
            ours=lambda: dk.gumbel_softmax(logits, TAU, dim=1),
            eager=lambda: gumbel_softmax(logits, TAU, dim=1),
            softmax_alone=lambda: logits.softmax(1),
        )


@dtypes
def test_forward_and_backward(versus, dtype):
    logits = torch.randn(SHAPE).to(getattr(torch, dtype)).requires_grad_()
    grad = torch.randn(SHAPE).to(logits.dtype)

    def both(function):
        return lambda: torch.autograd.grad(function(), logits, grad)

    versus(
        ours=both(lambda: dk.gumbel_softmax(logits, TAU, dim=1)),
        eager=both(lambda: gumbel_softmax(logits, TAU, dim=1)),
        softmax_alone=both(lambda: logits.softmax(1)),
    )
