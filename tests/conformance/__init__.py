"""What every backend must satisfy, stated once over a target: a backend and where it runs.

tests/test_conformance.py runs it on the CPU kernels, the reference, the emulated CUDA kernels and the interpreted
Triton kernels; `make gpu` on a GPU, where pytest may be missing.
"""

from __future__ import annotations

import itertools

from . import decode_attention, gumbel_softmax, sample_tokens, sparse_attention
from .target import Case, Target

__all__ = ["Case", "Target", "cases"]


def cases(target: Target) -> list[Case]:
    """All checks of a target, those of the operations in turn: one operation's crash keeps no other from running."""
    modules = sparse_attention, gumbel_softmax, sample_tokens, decode_attention
    in_turn = itertools.zip_longest(*(module.cases(target) for module in modules))
    return [case for cases in in_turn for case in cases if case is not None]
