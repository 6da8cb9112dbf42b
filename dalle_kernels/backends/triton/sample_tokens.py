"""sample_tokens: one token per row, the argmax of logits / temperature + noise over the tokens that top_k and top_p
keep.

A program processes one row. It maps logits to sort keys, unsigned integers in the order of the floats. Both filters
keep all keys from a threshold up; the threshold is found bit by bit, with one pass over the row per bit. A row that
fits a block stays in registers; longer rows are read again.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from . import launch
from .math import LOG2E
from .philox import gumbel, random_quads
from .registration import register

PADDING = tl.constexpr(0)  # beyond a row's end
MINUS_INF_KEY = tl.constexpr(0x007FFFFF)
INF_KEY = tl.constexpr(0xFF800000)
NAN_KEY = tl.constexpr(0xFFFFFFFF)
SIGN = tl.constexpr(0x80000000)
ALL = tl.constexpr(0xFFFFFFFF)
BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}  # number of upper bits in which keys differ


@triton.jit
def _key(x):
    """The sort key of a float. NaN has the largest key, and the keys of the two zeros are equal."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(x != x, NAN_KEY, bits ^ tl.where(bits >= SIGN, ALL, SIGN))


@triton.jit
def _value(key):
    return (key ^ tl.where(key >= SIGN, SIGN, ALL)).to(tl.float32, bitcast=True)


@triton.jit
def _ranked(key, token):
    """Key and token in one integer; the maximum is the first token with the largest key."""
    return (key.to(tl.uint64) << 32) | (token.to(tl.uint32) ^ ALL).to(tl.uint64)


@triton.jit
def _keys(logits, begin, vocabulary, held, RESIDENT: tl.constexpr, BLOCK: tl.constexpr):
    """Sort keys of the block at `begin`; `held` if the whole row is in registers (RESIDENT)."""
    if RESIDENT:
        keys = held
    else:
        token = begin + tl.arange(0, BLOCK)
        inside = token < vocabulary
        keys = tl.where(inside, _key(tl.load(logits + token, inside, 0.0).to(tl.float32)), PADDING)
    return keys


@triton.jit
def _weights(keys, least, top, scale_log2):
    """Unnormalised softmax(logits / temperature) over the keys >= `least`."""
    return tl.where(keys >= least, tl.exp2((_value(keys) - top) * scale_log2), 0.0)


@triton.jit
def _mass(
    start, logits, vocabulary, held, held_weights, least, top, scale_log2,
    COUNT: tl.constexpr, RESIDENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Total weight of the keys >= `start`; COUNT: every key has weight 1."""
    mass = tl.zeros([BLOCK // 4], tl.float64)
    for begin in range(0, vocabulary, BLOCK):
        keys = _keys(logits, begin, vocabulary, held, RESIDENT, BLOCK)
        if COUNT:
            weights = tl.full([BLOCK], 1.0, tl.float32)
        elif RESIDENT:
            weights = held_weights
        else:
            weights = _weights(keys, least, top, scale_log2)
        weights = tl.where(keys >= start, weights, 0.0)
        mass += tl.sum(tl.reshape(weights, [BLOCK // 4, 4]), 1).to(tl.float64)
    return tl.sum(mass)


@triton.jit
def _threshold(
    target, logits, vocabulary, held, held_weights, least, top, scale_log2,
    COUNT: tl.constexpr, BITS: tl.constexpr, RESIDENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key such that the total weight of all keys >= it is at least `target`. Its lower bits, in which no
    keys differ, are 0. Rounded sums are monotonic in the threshold too, because excluded keys are added as 0.
    """
    found = tl.full([], 0, tl.uint32)
    bit = tl.full([], SIGN, tl.uint32)
    for _ in range(BITS):
        mass = _mass(
            found | bit, logits, vocabulary, held, held_weights, least, top, scale_log2, COUNT, RESIDENT, BLOCK
        )
        found = tl.where(mass >= target, found | bit, found)
        bit = bit >> 1
    return found


@triton.jit(do_not_specialize=["top_k", "top_p"])
def _sample_row(
    logits, row_step, seed, offset, tokens, vocabulary, temperature, top_k, top_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, BITS: tl.constexpr, RESIDENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Samples the token of one row. top_p: the bits of a float64, because Triton would round a float to float32."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_step
    held = _keys(logits, 0, vocabulary, 0, False, BLOCK)
    best = tl.zeros([BLOCK], tl.uint64)
    for begin in range(0, vocabulary, BLOCK):
        keys = _keys(logits, begin, vocabulary, held, RESIDENT, BLOCK)
        best = tl.maximum(best, _ranked(keys, begin + tl.arange(0, BLOCK)))
    largest = tl.max(best, 0)

    # If the largest logit is not finite, its token is the result: the first NaN, else +inf; token 0 if all are -inf.
    top_key = (largest >> 32).to(tl.uint32)
    if (top_key > MINUS_INF_KEY) & (top_key < INF_KEY):
        top = _value(top_key)
        least = tl.full([], PADDING + 1, tl.uint32)
        if TOP_K:
            least = _threshold(
                top_k.to(tl.float64), logits, vocabulary, held, 0.0, least, top, 0.0, True, BITS, RESIDENT, BLOCK
            )
        if TOP_P:
            scale_log2 = tl.div_rn(LOG2E, temperature)
            held_weights = _weights(held, least, top, scale_log2)
            total = _mass(least, logits, vocabulary, held, held_weights, least, top, scale_log2, False, RESIDENT, BLOCK)
            target = top_p.to(tl.int64).to(tl.float64, bitcast=True) * total
            least = _threshold(
                target, logits, vocabulary, held, held_weights, least, top, scale_log2, False, BITS, RESIDENT, BLOCK
            )
        inverse_temperature = tl.div_rn(1.0, temperature)
        best = tl.zeros([BLOCK], tl.uint64)
        for begin in range(0, vocabulary, BLOCK):
            keys = _keys(logits, begin, vocabulary, held, RESIDENT, BLOCK)
            quads = (begin + tl.arange(0, BLOCK // 4) * 4).to(tl.int64)
            noise = gumbel(random_quads(tl.load(seed + row), tl.load(offset + row), quads, True))
            score = (_value(keys) - top) * inverse_temperature + noise
            ranked = _ranked(_key(score), begin + tl.arange(0, BLOCK))
            best = tl.maximum(best, tl.where(keys >= least, ranked, 0))
        largest = tl.max(best, 0)
    tl.store(tokens + row, (largest.to(tl.uint32) ^ ALL).to(tl.int64))


def _sample_tokens(logits, seed, offset, temperature, top_k, top_p):
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, vocabulary = logits.shape
    tokens = seed.new_empty(rows)
    line = launch.lookup("sample_tokens", logits.device, 0, logits.dtype)
    block = min(max(triton.next_power_of_2(vocabulary), 4), line.columns)
    (top_p_bits,) = struct.unpack("q", struct.pack("d", top_p))
    launch.start(
        _sample_row, rows, line.warps, line.stages,
        logits, logits.stride(0), seed.contiguous(), offset.contiguous(), tokens,
        vocabulary, temperature, top_k, top_p_bits,
        TOP_K=0 < top_k < vocabulary, TOP_P=top_p < 1.0, BITS=BITS[logits.dtype],
        RESIDENT=vocabulary <= block, BLOCK=block,
    )  # fmt: skip
    return tokens


def _fake(logits, seed, offset, temperature, top_k, top_p):
    return seed.new_empty(logits.shape[0])


sample_tokens = register(
    "sample_tokens(Tensor logits, Tensor seed, Tensor offset, float temperature, int top_k, float top_p) -> Tensor",
    _sample_tokens,
    _fake,
)
