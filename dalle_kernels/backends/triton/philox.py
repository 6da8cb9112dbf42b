"""Philox4x32-10 and Gumbel noise, a function of (seed, offset, index) specified in dalle_kernels/philox.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .math import log1p_negated, natural_log


@triton.jit
def random_words(seed, offset, block):
    """Four uint32 random words, for the indices 4 * block to 4 * block + 3; all arguments are int64."""
    return tl.philox(
        seed,
        block.to(tl.uint32), (block >> 32).to(tl.uint32),
        (offset + tl.zeros_like(block)).to(tl.uint32), ((offset + tl.zeros_like(block)) >> 32).to(tl.uint32),
    )  # fmt: skip


@triton.jit
def random_bits(seed, offset, index):
    """32 random bits (uint32) per index (int64 tensor). For consecutive indices `random_words` costs a quarter."""
    a, b, c, d = random_words(seed, offset, index >> 2)
    word = index & 3
    return tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))


@triton.jit
def gumbel(bits):
    """Random bits -> u -> -log(-log1p(-u)), float32."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)  # 2^-32; 1 - 2^-24
    return -natural_log(-log1p_negated(u))


@triton.jit
def random_quads(seed, offset, first, ALIGNED: tl.constexpr):
    """The random bits of the indices first to first + 3 for every element of `first` (int64), side by side: [..., n] ->
    [..., 4 n]. ALIGNED: all elements of `first` are multiples of 4, which halves the work.
    """
    a, b, c, d = random_words(seed, offset, first >> 2)
    if not ALIGNED:  # the last indices may be in the next block
        e, f, g, _ = random_words(seed, offset, (first >> 2) + 1)
        by_two, by_one = (first & 2) != 0, (first & 1) != 0
        a, b, c = tl.where(by_two, c, a), tl.where(by_two, d, b), tl.where(by_two, e, c)
        d, e = tl.where(by_two, f, d), tl.where(by_two, g, e)
        a, b, c, d = tl.where(by_one, b, a), tl.where(by_one, c, b), tl.where(by_one, d, c), tl.where(by_one, e, d)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
