"""Exponential and logarithm with error bounds that hold on every device."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.44269504)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def exp2(x, PRECISE: tl.constexpr):
    """2^x for x <= 127; 0 for -inf. PRECISE: relative error below 1.2e-7 on every device, for float32 x; otherwise the
    device's own 2^x, which is accurate enough for 16-bit results.
    """
    if not PRECISE:
        return tl.exp2(x)
    x = tl.where(x < -127.0, -127.0, x)  # (tl.maximum would lose NaN)
    shifted = x + 12582912.0  # 1.5 * 2^23: rounds to the nearest integer, held in the lowest bits
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
def natural_log(x):
    """log x for positive, normal float32 x, to within 1 ulp on every device."""
    e = _scaled_exponent(x)
    return _log_split(e, (x.to(tl.int32, bitcast=True) - e).to(tl.float32, bitcast=True) - 1.0)


@triton.jit
def log1p_negated(u):
    """log(1 - u) for float32 u in (0, 1), to within 1 ulp even for small u."""
    # 1 - u = 2^e (1 + g), where g = 2^-e - 1 - 2^-e u is exact
    e = _scaled_exponent(1.0 - u)
    scale = (0x3F800000 - e).to(tl.float32, bitcast=True)
    return _log_split(e, tl.fma(-scale, u, scale - 1.0))


@triton.jit
def _scaled_exponent(x):
    """e * 2^23 for x = 2^e m, m in [0.75, 1.5): the exponent bits to subtract from x to get m."""
    return (x.to(tl.int32, bitcast=True) - 0x3F400000) & -0x00800000


@triton.jit
def _log_split(scaled_e, f):
    """log(2^e (1 + f)) for f in [-0.25, 0.5], from e * 2^23."""
    p = tl.full(f.shape, -4.49095816e-2, tl.float32)
    p = tl.fma(p, f, 1.04483288e-1)
    p = tl.fma(p, f, -1.31622319e-1)
    p = tl.fma(p, f, 1.44820619e-1)
    p = tl.fma(p, f, -1.66477672e-1)
    p = tl.fma(p, f, 1.99906067e-1)
    p = tl.fma(p, f, -2.50000546e-1)
    p = tl.fma(p, f, 3.33334544e-1)
    p = tl.fma(p, f, -5.00000008e-1)
    # e log 2 + f and its rounding error; e times the upper part of log 2 is exact
    e = scaled_e.to(tl.float32)
    high = e * 8.262941264547408e-08  # 0x1.62E4p-1 * 2^-23
    total = high + f
    lost = tl.fma(e, 1.7030319809913635e-13, f - (total - high))  # 1.42860677e-6 * 2^-23
    return total + tl.fma(f * f, p, lost)
