"""Online softmax over blocks of scores. The state of a row is a running maximum and a running sum of weights.

Scores are scaled by a positive `scale_log2` after their maximum is taken, so that exp2 gives the weights. The caller
accumulates the unnormalised output: it multiplies it by the rescale factor `alpha` and adds the new weighted values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import INFINITY, exp2


@triton.jit
def empty(ROWS: tl.constexpr):
    """(maximum, total) [ROWS] before the first score."""
    return tl.full([ROWS], -INFINITY, tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def update(maximum, total, scores, scale_log2, PRECISE: tl.constexpr):
    """Adds scores [ROWS, COLUMNS] to the state; returns (maximum, total, alpha [ROWS], weights [ROWS, COLUMNS])."""
    new = tl.maximum(maximum, tl.max(scores, 1))
    safe = _finite(new)
    alpha = exp2((maximum - safe) * scale_log2, PRECISE)
    if PRECISE:
        weights = exp2((scores - safe[:, None]) * scale_log2, PRECISE)
    else:  # one multiply-add
        weights = exp2(scores * scale_log2 - (safe * scale_log2)[:, None], PRECISE)
    return new, total * alpha + tl.sum(weights, 1), alpha, weights


@triton.jit
def merge(maximum, total, other_maximum, other_total, scale_log2, PRECISE: tl.constexpr):
    """Merges two states of a row; returns (maximum, total, alpha, beta), the rescale factors of the first and the other
    unnormalised output.
    """
    new = tl.maximum(maximum, other_maximum)
    safe = _finite(new)
    alpha = exp2((maximum - safe) * scale_log2, PRECISE)
    beta = exp2((other_maximum - safe) * scale_log2, PRECISE)
    return new, total * alpha + other_total * beta, alpha, beta


@triton.jit
def _finite(maximum):
    """The running maximum, or 0 while it is still -inf, so that inf - inf cannot arise."""
    return tl.where(maximum == -INFINITY, 0.0, maximum)
