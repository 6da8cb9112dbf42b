"""Gumbel-softmax over the vocabulary of the published dVAE against F.gumbel_softmax, eager and compiled, and against a
softmax without noise: soft, hard, and with the KL to the uniform distribution; time and peak memory.
"""

import math
from functools import partial

import pytest
import torch
from common.baselines import uniform_kl
from comparison import SETTING, attempt, compiled
from memory import peak_bytes
from torch.nn.functional import gumbel_softmax

import dalle_kernels as dk

TAU = 0.9
# Logits of the codes of two images, with the classes in dim 1, and as many rows with the classes last.
SHAPES = {"codes": ((2, 8192, 32, 32), 1), "rows": ((2048, 8192), -1)}
if SETTING.tiny:
    SHAPES = {"codes": ((2, 64, 4, 4), 1), "rows": ((8, 64), -1)}
EAGER, COMPILED, SOFTMAX = "F.gumbel_softmax", "compiled", "softmax without noise"

CASES = [("codes", "float32"), ("codes", "bfloat16"), ("rows", "float32")]
KINDS = [*(("soft", *case) for case in CASES), ("hard", *CASES[0]), ("kl", *CASES[0]), ("kl", *CASES[1])]


def functions(kind, dim):
    """{name: logits -> results} for ours and the baselines. `kind`: soft, hard or kl."""
    if kind == "kl":
        return {
            "ours": lambda x: dk.gumbel_softmax(x, TAU, dim=dim, return_kl=True),
            EAGER: lambda x: (gumbel_softmax(x, TAU, dim=dim), uniform_kl(x, dim)),
            SOFTMAX: lambda x: (x.softmax(dim), uniform_kl(x, dim)),
        }
    hard = kind == "hard"
    return {
        "ours": lambda x: dk.gumbel_softmax(x, TAU, hard, dim=dim),
        EAGER: lambda x: gumbel_softmax(x, TAU, hard, dim=dim),
        SOFTMAX: lambda x: x.softmax(dim),
    }


def function(name, kind, backward, shape, dim, dtype):
    """One pass over random logits, or Unavailable if there is no compiler."""
    logits, grad = torch.randn(2, *shape).to(getattr(torch, dtype)).unbind(0)
    every = functions(kind, dim)
    run = attempt(lambda: compiled(every[EAGER])) if name == COMPILED else every[name]
    if not callable(run):
        return run
    if backward:
        leaf = logits.detach().requires_grad_()
        grads = (grad, torch.ones(logits.select(dim, 0).shape)) if kind == "kl" else grad
        return lambda: torch.autograd.grad(run(leaf), leaf, grads)

    @torch.inference_mode()
    def forward():
        return run(logits)

    return forward


def against_all(versus, kind, backward, shape, dtype):
    make = partial(function, kind=kind, backward=backward, shape=SHAPES[shape][0], dim=SHAPES[shape][1], dtype=dtype)
    versus(make("ours"), {name: make(name) for name in (EAGER, COMPILED, SOFTMAX)})


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_forward(versus, shape, dtype):
    """codes: [2, 8192, 32, 32] over dim 1; rows: [2048, 8192] over dim -1."""
    against_all(versus, "soft", False, shape, dtype)


@pytest.mark.parametrize(("kind", "shape", "dtype"), KINDS)
def test_forward_and_backward(versus, kind, shape, dtype):
    """kl: with the KL to the uniform distribution, also for the softmax without noise."""
    against_all(versus, kind, True, shape, dtype)


@pytest.mark.parametrize("kind", ["soft", "hard", "kl"])
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def test_peak_memory(record, direction, kind):
    """Peak memory of a call beyond its logits and the output's gradient, in a new process, in units of the float32
    logits. The results alone take 1, and 2 with the logits' gradient.
    """
    shape, dim = SHAPES["codes"]
    units = 4 * math.prod(shape)
    rest = kind, direction != "forward"
    peaks = {
        name: peak_bytes(function, (name, *rest, (1, 64, 4, 4), dim, "float32"), (name, *rest, shape, dim, "float32"))
        for name in ("ours", EAGER, SOFTMAX)
    }
    record({name: peak / units for name, peak in peaks.items() if peak is not None})
