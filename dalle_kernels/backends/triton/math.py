"""Exponential and logarithm whose error is bounded on every device."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.44269504)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def exp2(x, PRECISE: tl.constexpr):
    """2^x for x <= 127; 0 for -inf. PRECISE: with a relative error below 1.2e-7 on every device, for x float32; else as
    the device has it, which suits results of 16 bits.
    """
    if not PRECISE:
        return tl.exp2(x)
    x = tl.where(x < -127.0, -127.0, x)  # (tl.maximum would lose NaN)
    shifted = x + 12582912.0  # 1.5 * 2^23: rounds to the nearest integer, which then stands in the lowest bits
    f = x - (shifted - 12582912.0)
    p = tl.full(x.shape, 1.535336191e-4, tl.float32)
    p = tl.fma(p, f, 1.339887441e-3)
    p = tl.fma(p, f, 9.618437358e-3)
    p = tl.fma(p, f, 5.550332471e-2)
    p = tl.fma(p, f, 2.402264791e-1)
    p = tl.fma(p, f, 6.931472029e-1)
    p = tl.fma(p, f, 1.0)
    return p * ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def finite(maximum):
    """A maximum so far as something to subtract: where nothing was seen it is -inf, and -inf - 0 serves as well."""
    return tl.where(maximum == -INFINITY, 0.0, maximum)
