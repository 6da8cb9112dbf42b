"""Gumbel-softmax over the vocabulary of the published dVAE (dim 1 of [B, 8192, 32, 32]) against F.gumbel_softmax: soft,
hard, and with the KL to the uniform distribution.
"""

import math

import pytest
import torch
from torch.nn.functional import gumbel_softmax

import dalle_kernels as dk

SHAPE, TAU = (2, 8192, 32, 32), 0.9
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def inputs(dtype):
    return torch.randn(2, *SHAPE).to(getattr(torch, dtype)).unbind(0)


def plain_kl(logits):
    log_p = logits.float().log_softmax(1)
    return (log_p.exp() * (log_p + math.log(SHAPE[1]))).sum(1)


@dtypes
def test_forward(versus, dtype):
    logits, _ = inputs(dtype)
    with torch.inference_mode():
        versus(
            ours=lambda: dk.gumbel_softmax(logits, TAU, dim=1),
            eager=lambda: gumbel_softmax(logits, TAU, dim=1),
            softmax_without_noise=lambda: logits.softmax(1),
        )


@dtypes
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_forward_and_backward(versus, hard, dtype):
    logits, grad = inputs(dtype)
    logits.requires_grad_()

    def both(function):
        return lambda: torch.autograd.grad(function(), logits, grad)

    versus(
        ours=both(lambda: dk.gumbel_softmax(logits, TAU, hard, dim=1)),
        eager=both(lambda: gumbel_softmax(logits, TAU, hard, dim=1)),
        softmax_without_noise=both(lambda: logits.softmax(1)),
    )


@dtypes
def test_forward_and_backward_with_kl(versus, dtype):
    logits, grad = inputs(dtype)
    logits.requires_grad_()
    grads = [grad, torch.ones(SHAPE[0], *SHAPE[2:])]

    def both(function):
        return lambda: torch.autograd.grad(function(), logits, grads)

    versus(
        ours=both(lambda: dk.gumbel_softmax(logits, TAU, dim=1, return_kl=True)),
        eager=both(lambda: (gumbel_softmax(logits, TAU, dim=1), plain_kl(logits))),
        softmax_without_noise=both(lambda: (logits.softmax(1), plain_kl(logits))),
    )
