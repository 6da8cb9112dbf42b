"""gumbel_softmax: softmax((logits + noise) / tau) over one dimension, and the KL divergence from the uniform
distribution; forward and backward.

Logits are viewed as [outer, classes, inner]; a position is one row of classes. A program processes one tile: adjacent
positions with all their classes, or with a chunk of them. It reduces the tile's classes to statistics of each position
and writes the results. Positions with several chunks take two passes: the first stores the statistics of each tile in
`partials`, which are merged; the second reads the tiles again. Regenerating the noise costs less than storing it.
Statistics are merged in a fixed order that depends on classes and inner only.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..autograd import gumbel_softmax as shared
from . import launch
from .math import INFINITY, LOG2E, exp2, natural_log
from .philox import gumbel, random_quads
from .registration import register

# -- statistics of a position over its classes: up to three float32 words. `_merge` reduces both elements (as the words
# in brackets) and partial statistics.

SOFTMAX = tl.constexpr("softmax")  # maximum, sum of w = exp(scale * (x - maximum)) [x, 1]
WEIGHTED = tl.constexpr("weighted")  # maximum, sum of w, sum of w v [x, 1, v]
ENTROPY = tl.constexpr("entropy")  # maximum, sum of w, sum of w log w, with scale 1 [x, 1, 0]
BEST = tl.constexpr("best")  # the largest x, and the first class with it (as the bits of a float) [x, class]
DOT = tl.constexpr("dot")  # a sum [x]
WORDS = {"softmax": 2, "weighted": 3, "entropy": 3, "best": 2, "dot": 1}

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the maximum of no elements; finite, so that inf - inf cannot arise
FAR = tl.constexpr(-1e4)  # exp(FAR) is 0 and so is 0 * FAR, unlike 0 * -inf
LAST_CLASS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _merge(words, scale_log2, KIND: tl.constexpr, PRECISE: tl.constexpr, AXIS: tl.constexpr):
    """Reduces statistics along AXIS, which becomes a dimension of size 1. NaN and +inf turn sums into NaN."""
    x, second, third = words
    if KIND == DOT:
        x = tl.sum(x, AXIS, keep_dims=True)
    elif KIND == BEST:  # NaN counts as inf: y is NaN either way
        x = tl.where(x == x, x, INFINITY)
        largest = tl.max(x, AXIS, keep_dims=True)
        classes = tl.where(x == largest, second.to(tl.int32, bitcast=True), LAST_CLASS)
        x, second = largest, tl.min(classes, AXIS, keep_dims=True).to(tl.float32, bitcast=True)
    else:
        largest = tl.max(x, AXIS, keep_dims=True)
        largest = tl.where(largest > LOWEST, largest, LOWEST)
        if KIND == ENTROPY:
            d = _not_below_far(x - largest)
            w = exp2(d * LOG2E, True)
            third = tl.sum(w * (second * d + third), AXIS, keep_dims=True)
        else:
            w = exp2((x - largest) * scale_log2, PRECISE)
            if KIND == WEIGHTED:
                third = tl.sum(w * third, AXIS, keep_dims=True)
        x, second = largest, tl.sum(w * second, AXIS, keep_dims=True)
    return x, second, third


@triton.jit
def _not_below_far(d):
    return tl.where(d < FAR, FAR, d)  # NaN stays


@triton.jit
def _load_words(partials, at, step, mask, KIND: tl.constexpr, COUNT: tl.constexpr):
    """Loads words that are `step` apart; masked ones are the statistics of no elements."""
    empty: tl.constexpr = 0.0 if KIND == DOT else -float("inf")
    first = tl.load(partials + at, mask, empty)
    second = tl.load(partials + at + step, mask, 0.0) if COUNT > 1 else 0.0
    third = tl.load(partials + at + 2 * step, mask, 0.0) if COUNT > 2 else 0.0
    return first, second, third


@triton.jit
def _store_words(partials, at, step, mask, words, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(partials + at + i * step, words[i], mask)


@triton.jit(do_not_specialize=["positions", "chunks"])
def _merge_chunks(
    partials, merged, tau, positions, chunks, KIND: tl.constexpr, COUNT: tl.constexpr, PRECISE: tl.constexpr,
    CHUNKS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Merges partials [COUNT, chunks, positions] into merged [COUNT, groups, positions], CHUNKS chunks per group."""
    groups = tl.cdiv(chunks, CHUNKS)
    group, block = tl.program_id(0) % groups, tl.program_id(0) // groups
    chunk = group * CHUNKS + tl.arange(0, CHUNKS)[:, None]
    position = block.to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    mask = (chunk < chunks) & (position < positions)
    step = positions.to(tl.int64)
    words = _load_words(partials, chunk * step + position, chunks * step, mask, KIND, COUNT)
    words = _merge(words, tl.div_rn(LOG2E, tl.load(tau)), KIND, PRECISE, 0)
    _store_words(merged, group * step + position, groups * step, position < positions, words, COUNT)


# -- tiles


@triton.jit
def _tile(outer, classes, inner, chunks, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's tile [ROWS, COLUMNS], whose columns are contiguous in memory. AXIS: the dimension of the classes
    in the tile, which is 1 if inner is 1.

    Returns (chunk, index of the first element, stride of a row, class of each element, mask of the elements that exist,
    index of each position in [outer, inner], mask of the positions that exist).
    """
    chunk, strip = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if AXIS == 1:
        first_class, of_class = chunk * COLUMNS, column
        first_place = strip.to(tl.int64) * ROWS
        place = first_place + row
        exists = place < outer
        first, step = first_place * classes + first_class, classes
    else:
        first_class, of_class = chunk * ROWS, row
        strips = (inner - 1) // COLUMNS + 1  # cannot overflow, unlike (inner + COLUMNS - 1) // COLUMNS
        at, o = strip % strips * COLUMNS, (strip // strips).to(tl.int64)
        place = o * inner + at + column
        exists = column < inner - at
        first, step = (o * classes + first_class) * inner + at, inner
    inside = (of_class < classes - first_class) & exists
    return chunk, first, step, first_class + of_class, inside, place, exists


@triton.jit
def _elements(first, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVERY: tl.constexpr):
    """Indices in the tensor of every EVERY-th element of a tile."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS // EVERY)[None, :]
    return first + row.to(tl.int64) * step + column * EVERY


@triton.jit
def _load(tensor, first, step, inside, fill, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(tensor + _elements(first, step, ROWS, COLUMNS, 1), inside, fill).to(tl.float32)


@triton.jit
def _store(tensor, first, step, inside, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(tensor + _elements(first, step, ROWS, COLUMNS, 1), x.to(tensor.dtype.element_ty), inside)


@triton.jit
def _noise(seed, first, step, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The noise of a tile. An element's noise index is its index in the tensor."""
    return gumbel(random_quads(tl.load(seed), 0, _elements(first, step, ROWS, COLUMNS, 4), ALIGNED))


@triton.jit
def _statistics(
    words, partials, at, step, mask, scale_log2, KIND: tl.constexpr, COUNT: tl.constexpr, PRECISE: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The FIRST pass reduces the tile and, if it is not also the LAST, stores the partials; the second pass loads the
    merged ones.
    """
    if FIRST:
        words = _merge(words, scale_log2, KIND, PRECISE, AXIS)
        if not LAST:
            _store_words(partials, at, step, mask, words, COUNT)
    else:
        words = _load_words(partials, at, step, mask, KIND, COUNT)
    return words


@triton.jit
def _partials_at(chunk, chunks, place, positions, FIRST: tl.constexpr):
    """(offset of a chunk's words in [words, chunks, positions], stride of a word). After the FIRST pass the chunks are
    merged into one.
    """
    if FIRST:
        at, step = chunk * positions + place, chunks * positions
    else:
        at, step = place, positions
    return at, step


# -- the kernels


@triton.jit(do_not_specialize=["outer"])
def _forward(
    logits, y, kl, stats, seed, tau, partials, entropies, outer, classes, inner, chunks,
    HARD: tl.constexpr, KL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    AXIS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = logits.dtype.element_ty == tl.float32
    chunk, first, step, of_class, inside, place, exists = _tile(outer, classes, inner, chunks, AXIS, ROWS, COLUMNS)
    positions, scale_log2 = outer.to(tl.int64) * inner, tl.div_rn(LOG2E, tl.load(tau))
    x = _load(logits, first, step, inside, -INFINITY, ROWS, COLUMNS)
    noisy = x + _noise(seed, first, step, ALIGNED, ROWS, COLUMNS)
    KIND: tl.constexpr = BEST if HARD else SOFTMAX
    words = noisy, of_class.to(tl.float32, bitcast=True) if HARD else 1.0, 0.0
    at, gap = _partials_at(chunk, chunks, place, positions, FIRST)
    words = _statistics(words, partials, at, gap, exists, scale_log2, KIND, 2, PRECISE, FIRST, LAST, AXIS)
    if KL:
        words_kl = x, 1.0, 0.0
        entropy = _statistics(words_kl, entropies, at, gap, exists, LOG2E, ENTROPY, 3, True, FIRST, LAST, AXIS)
    if LAST:
        if KL:
            _store_kl(kl, stats, entropy, classes, positions, place, exists & (place * 0 + chunk == 0))
        if HARD:  # NaN instead of 0 and 1 if the row has no finite maximum
            zero = words[0] - words[0]
            result = tl.where(of_class == words[1].to(tl.int32, bitcast=True), zero + 1.0, zero)
        else:
            result = exp2((noisy - words[0]) * scale_log2, PRECISE) * tl.div_rn(1.0, words[1])
        _store(y, first, step, inside, result, ROWS, COLUMNS)


@triton.jit
def _store_kl(kl, stats, entropy, classes, positions, place, mask):
    """kl: sum p (log p + log classes), p = softmax(logits). stats [2, positions]: maximum, sum of exp(x - maximum)."""
    maximum, total, weighted = entropy
    tl.store(stats + place, maximum, mask)
    tl.store(stats + positions + place, total, mask)
    tl.store(kl + place, tl.div_rn(weighted, total) + _log_ratio(classes, total), mask)


@triton.jit
def _log_ratio(classes, total):
    return natural_log(tl.div_rn(tl.zeros_like(total) + classes, total))


@triton.jit(do_not_specialize=["outer"])
def _backward(
    grad_y, grad_kl, y, logits, kl, stats, grad_logits, seed, tau, partials, outer, classes, inner, chunks,
    HARD: tl.constexpr, KL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    AXIS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y * (grad - sum y grad) / tau; and with KL, grad_kl * p * (log p + log classes - kl), p = softmax(logits)."""
    PRECISE: tl.constexpr = grad_y.dtype.element_ty == tl.float32
    chunk, first, step, _, inside, place, exists = _tile(outer, classes, inner, chunks, AXIS, ROWS, COLUMNS)
    positions, scale_log2 = outer.to(tl.int64) * inner, tl.div_rn(LOG2E, tl.load(tau))
    grad = _load(grad_y, first, step, inside, 0.0, ROWS, COLUMNS)
    KIND: tl.constexpr = WEIGHTED if HARD else DOT
    if HARD:  # the soft y was not stored
        x = _load(logits, first, step, inside, -INFINITY, ROWS, COLUMNS)
        x += _noise(seed, first, step, ALIGNED, ROWS, COLUMNS)
        words = x, 1.0, grad
    else:
        soft = _load(y, first, step, inside, 0.0, ROWS, COLUMNS)
        words = soft * grad, 0.0, 0.0
    at, gap = _partials_at(chunk, chunks, place, positions, FIRST)
    COUNT: tl.constexpr = 3 if HARD else 1
    words = _statistics(words, partials, at, gap, exists, scale_log2, KIND, COUNT, PRECISE, FIRST, LAST, AXIS)
    if LAST:
        if HARD:
            factor = tl.div_rn(1.0, words[1])
            soft, dot = exp2((x - words[0]) * scale_log2, PRECISE) * factor, words[2] * factor
        else:
            dot = words[0]
        result = soft * tl.div_rn(1.0, tl.load(tau)) * (grad - dot)
        if KL:
            x = _load(logits, first, step, inside, 0.0, ROWS, COLUMNS)
            total = tl.load(stats + positions + place, exists, 1.0)
            d = _not_below_far(x - tl.load(stats + place, exists, 0.0))
            shift = _log_ratio(classes, total) - tl.load(kl + place, exists, 0.0)
            factor = tl.div_rn(tl.load(grad_kl + place, exists, 0.0), total)
            result += factor * exp2(d * LOG2E, PRECISE) * (d + shift)
        _store(grad_logits, first, step, inside, result, ROWS, COLUMNS)


# -- the operations

CHUNKS, POSITIONS, MERGE_WARPS = 32, 32, 4  # of _merge_chunks


class _Problem:
    """The tiling of a contiguous tensor, and the launch of kernels on it."""

    def __init__(self, x, dim, tau):
        self.x, self.tau = x, tau
        self.outer, self.classes, self.inner = math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])
        self.axis = 1 if self.inner == 1 else 0
        name = "gumbel_softmax.last" if self.axis else "gumbel_softmax"
        self.line = launch.lookup(name, x.device, 0, x.dtype)
        size = self.line.rows * self.line.columns
        # nothing here depends on `outer`: results are batch-invariant
        if self.axis:
            columns = min(max(triton.next_power_of_2(self.classes), 4), self.line.columns)
            self.shape = max(size // 2 // columns, 1), columns  # several rows need more registers, for their addresses
            self.chunks, self.strips = triton.cdiv(self.classes, columns), triton.cdiv(self.outer, self.shape[0])
        else:
            rows = triton.next_power_of_2(self.classes)
            columns = min(max(triton.next_power_of_2(self.inner), 4), size // min(rows, self.line.rows))
            rows = min(rows, size // columns)
            self.shape = rows, columns
            self.chunks, self.strips = triton.cdiv(self.classes, rows), self.outer * triton.cdiv(self.inner, columns)

    def run(self, kernel, arguments, kinds, hard, kl):
        """Launches a kernel, in two passes if positions have several chunks. kinds: the statistics that it computes;
        None for an optional one that is not needed.
        """
        rows, columns = self.shape
        sizes = self.outer, self.classes, self.inner, self.chunks
        constants = dict(HARD=hard, KL=kl, AXIS=self.axis, ROWS=rows, COLUMNS=columns)
        constants["ALIGNED"] = (self.classes if self.axis else self.inner) % 4 == 0

        def start(partials, first, last):
            launch.start(
                kernel, self.strips * self.chunks, self.line.warps, self.line.stages,
                *arguments, self.tau, *partials, *sizes, **constants, FIRST=first, LAST=last,
            )  # fmt: skip

        if self.chunks == 1:
            return start([None] * len(kinds), True, True)
        partials = [self.words(kind, self.chunks) for kind in kinds]
        start(partials, True, False)
        start([self.merged(kind, words) for kind, words in zip(kinds, partials)], False, True)

    def words(self, kind, chunks):
        return kind and self.x.new_empty(WORDS[kind], chunks, self.outer * self.inner, dtype=torch.float32)

    def merged(self, kind, words):
        """Merges statistics [words, chunks, positions] into [words, 1, positions]."""
        if kind is None or words.shape[1] == 1:
            return words
        count, chunks, positions = words.shape
        groups = triton.cdiv(chunks, CHUNKS)
        result = self.words(kind, groups)
        launch.start(
            _merge_chunks, groups * triton.cdiv(positions, POSITIONS), MERGE_WARPS, 1,
            words, result, self.tau, positions, chunks, KIND=kind, COUNT=count,
            PRECISE=self.x.dtype == torch.float32, CHUNKS=CHUNKS, POSITIONS=POSITIONS,
        )  # fmt: skip
        return self.merged(kind, result)


def _gumbel_softmax(logits, seed, tau, hard, dim, return_kl):
    logits = logits.contiguous()
    y, kl, stats = shared.fake(logits, seed, tau, hard, dim, return_kl)
    kinds = "best" if hard else "softmax", "entropy" if return_kl else None
    _Problem(logits, dim, tau).run(_forward, (logits, y, kl, stats, seed), kinds, hard, return_kl)
    return y, kl, stats


# y is required unless hard; logits if hard or with grad_kl, which also requires kl and stats
def _gumbel_softmax_backward(grad_y, grad_kl, y, logits, kl, stats, seed, tau, hard, dim):
    grad_y, grad_kl, y, logits = (x if x is None else x.contiguous() for x in (grad_y, grad_kl, y, logits))
    grad_logits = grad_y.new_empty(grad_y.shape)
    arguments = grad_y, grad_kl, y, logits, kl, stats, grad_logits, seed
    kinds = ("weighted" if hard else "dot",)
    _Problem(grad_y, dim, tau).run(_backward, arguments, kinds, hard, grad_kl is not None)
    return grad_logits


_op = register(
    "gumbel_softmax(Tensor logits, Tensor seed, Tensor tau, bool hard, int dim, bool return_kl)"
    " -> (Tensor, Tensor, Tensor)",
    _gumbel_softmax,
    shared.fake,
)
_backward_op = register(
    "gumbel_softmax_backward(Tensor grad_y, Tensor? grad_kl, Tensor? y, Tensor? logits, Tensor? kl, Tensor? stats,"
    " Tensor seed, Tensor tau, bool hard, int dim) -> Tensor",
    _gumbel_softmax_backward,
    shared.fake_backward,
)
gumbel_softmax = shared.register_autograd(_op, _backward_op)
