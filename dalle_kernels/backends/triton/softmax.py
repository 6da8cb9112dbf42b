"""Online softmax: rows of scores come block by block, and a running maximum and sum of weights stand for what came.

Scores are scaled by a positive `scale_log2` after their maximum is taken, so that exp2 gives the weights. The caller
keeps the weighted sum of the values: it multiplies it by `keep` and adds the new weights' products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import INFINITY, exp2


@triton.jit
def empty(ROWS: tl.constexpr):
    """(maximum, total) [ROWS] of no scores."""
    return tl.full([ROWS], -INFINITY, tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def update(maximum, total, scores, scale_log2, PRECISE: tl.constexpr):
    """Takes scores [ROWS, COLUMNS]: (maximum, total, keep [ROWS], weights [ROWS, COLUMNS])."""
    new = tl.maximum(maximum, tl.max(scores, 1))
    less = _finite(new)
    keep = exp2((maximum - less) * scale_log2, PRECISE)
    if PRECISE:
        weights = exp2((scores - less[:, None]) * scale_log2, PRECISE)
    else:  # one multiply-add
        weights = exp2(scores * scale_log2 - (less * scale_log2)[:, None], PRECISE)
    return new, total * keep + tl.sum(weights, 1), keep, weights


@triton.jit
def merge(maximum, total, other_maximum, other_total, scale_log2, PRECISE: tl.constexpr):
    """Of two parts of a row: (maximum, total, keep, weight), the factors of the first and of the other part."""
    new = tl.maximum(maximum, other_maximum)
    less = _finite(new)
    keep = exp2((maximum - less) * scale_log2, PRECISE)
    weight = exp2((other_maximum - less) * scale_log2, PRECISE)
    return new, total * keep + other_total * weight, keep, weight


@triton.jit
def _finite(maximum):
    """Something to subtract: where nothing was seen the maximum is -inf, and -inf - 0 serves as well."""
    return tl.where(maximum == -INFINITY, 0.0, maximum)
