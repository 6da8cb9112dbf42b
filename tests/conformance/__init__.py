"""The conformance suite: requirements on every backend, as checks of a target (a backend on a device).

tests/test_conformance.py runs it on the CPU kernels, the reference, the emulated CUDA kernels and the interpreted
Triton kernels; `make gpu` runs it on a GPU, without pytest.
"""

from __future__ import annotations

import itertools

from . import decode_attention, gumbel_softmax, sample_tokens, sparse_attention
from .target import Case, Target

__all__ = ["Case", "Target", "cases"]


def cases(target: Target) -> list[Case]:
    """All checks of a target. Operations alternate, so that a crash of one does not prevent checks of the others."""
    modules = sparse_attention, gumbel_softmax, sample_tokens, decode_attention
    in_turn = itertools.zip_longest(*(module.cases(target) for module in modules))
    return [case for cases in in_turn for case in cases if case is not None]
