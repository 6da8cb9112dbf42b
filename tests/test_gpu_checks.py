"""The checks of `make gpu` under pytest: on the GPU where there is one with our kernels, else a dry run of every one of
them on the CPU's.
"""

import pytest
import torch
from gpu.checks import Place, cases
from gpu.setting import OURS

import dalle_kernels as dk
from dalle_kernels.backends import BACKENDS

PLACES = [Place("cuda", name) for name in OURS if name in BACKENDS] if torch.cuda.is_available() else []
CHECKS = [(place, *case) for place in PLACES or [Place("cpu", "cpu")] for case in cases(place, tiny=not PLACES)]


@pytest.mark.parametrize(("place", "name", "check"), CHECKS, ids=[f"{c[0].backend}: {c[1]}" for c in CHECKS])
def test_check(place, name, check, seed):
    check()


def broken(function):
    """The operation with one number of its result changed."""

    def call(*args, **options):
        result = function(*args, **options)
        if options.get("backend") == "reference":
            return result
        first, *rest = result if isinstance(result, tuple) else (result,)
        bump = torch.zeros_like(first)
        bump[(-1,) * bump.ndim] = 1
        return (first + bump, *rest) if rest else first + bump

    return call


FIRST = {"sparse_attention": "attention", "gumbel_softmax": "gumbel", "sample_tokens": "sample",
         "decode_attention": "decode"}  # fmt: skip


@pytest.mark.parametrize("operation", FIRST)
def test_checks_can_fail(operation, monkeypatch, seed):
    monkeypatch.setattr(dk, operation, broken(getattr(dk, operation)))
    first = next(check for name, check in cases(Place("cpu", "cpu"), tiny=True) if name.startswith(FIRST[operation]))
    with pytest.raises(AssertionError):
        first()
