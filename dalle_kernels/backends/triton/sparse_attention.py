"""sparse_attention: softmax(q kᵀ · scale) v over the pairs of a plan, forward and backward. docs/triton.md explains it.

Forward: a program processes one work item of the plan for one (batch, head), with an online softmax over groups of
columns. If a tile is split into several items, each stores a partial result, and a second kernel merges them in the
plan's order.

Backward, from lse, without atomics. With P = exp(S * scale - lse) and dP = dO Vᵀ:
    dQ = dS K * scale,  dK = dSᵀ Q * scale,  dV = Pᵀ dO,  where dS = P * (dP - delta),  delta = rowsum(dO * O).
One kernel owns tiles of queries and computes dQ; another owns tiles of keys and computes dK and dV, from a plan with
side="key". The rounding error of lse grows with lse and multiplies every weight of a query, which matters in float32.
There the first kernel also sums the recomputed weights, and both kernels divide by the sum. It also corrects delta, so
that delta has the same rounding error as dP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..autograd import sparse_attention as shared
from ..plans import PlanSizes
from . import launch, softmax
from .math import INFINITY, LOG2E, exp2
from .matrices import Matrices, load_rows, store_rows
from .plan import read_entry, row_tokens, sections, split_tile, where_allowed, work_item
from .registration import register

# -- forward


@triton.jit
def _forward(
    q, k, v, out, lse, partials, plan, scale, pairs, heads, n, NEGATE: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`scale` is positive, so that the maximum can be taken before scaling. NEGATE: the given scale was negative."""
    PRECISE: tl.constexpr = q.data.dtype.element_ty == tl.float32
    item, bh = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    tile, begin, end, partial = work_item(plan, item)
    rows = row_tokens(plan, tile, ROWS)
    q_rows = load_rows(q, heads, bh, rows, HEAD_DIM, D)
    if NEGATE:
        q_rows = -q_rows

    entries, gathered, masks = sections(plan)
    scale_log2 = scale * LOG2E
    maximum, total = softmax.empty(ROWS)
    acc = tl.zeros([ROWS, D], tl.float32)
    for e in tl.range(begin, end):
        tokens, mask = read_entry(entries, gathered, e, COLUMNS)
        k_rows = load_rows(k, heads, bh, tokens, HEAD_DIM, D)
        scores = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
        if mask >= 0:
            scores = where_allowed(scores, -INFINITY, masks, mask, ROWS, COLUMNS)
        maximum, total, alpha, weights = softmax.update(maximum, total, scores, scale_log2, PRECISE)
        v_rows = load_rows(v, heads, bh, tokens, HEAD_DIM, D)
        acc = tl.dot(weights.to(v_rows.dtype), v_rows, acc * alpha[:, None], input_precision="ieee")

    if partial >= 0:
        _save(partials, partial.to(tl.int64) * pairs + bh, acc, maximum, total, ROWS, D)
    else:
        _finish(out, lse, rows, acc, maximum, total, scale, heads, bh, n, HEAD_DIM, D)


@triton.jit
def _finish(out, lse, rows, acc, maximum, total, scale, heads, bh, n, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    store_rows(out, heads, bh, rows, acc / total[:, None], HEAD_DIM, D)
    tl.store(lse + bh.to(tl.int64) * n + rows, maximum * scale + tl.log(total), rows >= 0)


@triton.jit
def _save(partials, number, acc, x, y, ROWS: tl.constexpr, D: tl.constexpr):
    """Stores a partial result in scratch memory: acc [ROWS, D], x [ROWS] and y [ROWS], float32."""
    at, row = partials + number * (ROWS * (D + 2)), tl.arange(0, ROWS)
    tl.store(at + row[:, None] * D + tl.arange(0, D)[None, :], acc)
    tl.store(at + ROWS * D + row, x)
    tl.store(at + ROWS * (D + 1) + row, y)


@triton.jit
def _saved(partials, number, ROWS: tl.constexpr, D: tl.constexpr):
    at, row = partials + number * (ROWS * (D + 2)), tl.arange(0, ROWS)
    acc = tl.load(at + row[:, None] * D + tl.arange(0, D)[None, :])
    return acc, tl.load(at + ROWS * D + row), tl.load(at + ROWS * (D + 1) + row)


@triton.jit
def _combine(
    out, lse, partials, plan, scale, pairs, heads, n, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr
):
    """Merges the partial results of a split tile."""
    bh = tl.program_id(0) % pairs
    tile, first, count = split_tile(plan, tl.program_id(0) // pairs)
    maximum, total = softmax.empty(ROWS)
    acc = tl.zeros([ROWS, D], tl.float32)
    for i in range(count):
        part, part_maximum, part_total = _saved(partials, (first + i).to(tl.int64) * pairs + bh, ROWS, D)
        maximum, total, alpha, beta = softmax.merge(maximum, total, part_maximum, part_total, scale * LOG2E, True)
        acc = acc * alpha[:, None] + part * beta[:, None]
    rows = row_tokens(plan, tile, ROWS)
    _finish(out, lse, rows, acc, maximum, total, scale, heads, bh, n, HEAD_DIM, D)


# -- dQ by tiles of queries, and the statistics of the queries for the other kernel


@triton.jit
def _grad_q(
    q, k, v, out, grad_out, grad_q, lse, statistics, partials, plan, scale, pairs, heads, n,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = q.data.dtype.element_ty == tl.float32
    item, bh = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    tile, begin, end, partial = work_item(plan, item)
    rows = row_tokens(plan, tile, ROWS)
    q_rows = load_rows(q, heads, bh, rows, HEAD_DIM, D)
    grad_rows = load_rows(grad_out, heads, bh, rows, HEAD_DIM, D)
    delta = _diagonal(tl.dot(grad_rows, tl.trans(load_rows(out, heads, bh, rows, HEAD_DIM, D)), input_precision="ieee"))
    lse_log2 = tl.load(lse + bh.to(tl.int64) * n + rows, rows >= 0, 0.0) * LOG2E

    entries, gathered, masks = sections(plan)
    scale_log2 = scale * LOG2E
    total, excess = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    acc, mean = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, D], tl.float32)
    for e in tl.range(begin, end):
        tokens, mask = read_entry(entries, gathered, e, COLUMNS)
        k_rows = load_rows(k, heads, bh, tokens, HEAD_DIM, D)
        v_rows = load_rows(v, heads, bh, tokens, HEAD_DIM, D)
        scores = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
        weights = exp2(scores * scale_log2 - lse_log2[:, None], PRECISE)
        grad_scores = weights * (tl.dot(grad_rows, tl.trans(v_rows), input_precision="ieee") - delta[:, None])
        if mask >= 0:
            if PRECISE:
                weights = where_allowed(weights, 0.0, masks, mask, ROWS, COLUMNS)
            grad_scores = where_allowed(grad_scores, 0.0, masks, mask, ROWS, COLUMNS)
        if PRECISE:
            total += tl.sum(weights, 1)
            excess += tl.sum(grad_scores, 1)
            mean = tl.dot(weights, k_rows, mean, input_precision="ieee")
        acc = tl.dot(grad_scores.to(k_rows.dtype), k_rows, acc, input_precision="ieee")

    if partial >= 0:
        number = (partial.to(tl.int64) * pairs + bh) * (1 + PRECISE)
        _save(partials, number, acc, total, delta, ROWS, D)
        if PRECISE:
            _save(partials, number + 1, mean, excess, delta, ROWS, D)
    else:
        _finish_q(
            grad_q, lse, statistics, rows, acc, mean, total, excess, delta, scale, pairs, heads, bh, n,
            PRECISE, HEAD_DIM, D,
        )  # fmt: skip


@triton.jit
def _diagonal(x):
    """Diagonal of a [ROWS, ROWS] product; makes dP - delta exactly 0 for queries with a single key."""
    i = tl.arange(0, x.shape[0])
    return tl.sum(tl.where(i[:, None] == i[None, :], x, 0.0), 1)


@triton.jit
def _statistics_at(statistics, pairs, bh, n, tokens):
    """Pointers to lse (to base 2), delta, and the sum of the recomputed weights of the queries `tokens`."""
    at = statistics + bh.to(tl.int64) * n + tokens
    step = tl.full([1], pairs, tl.int64) * n  # pairs may be the constant 1
    return at, at + step, at + 2 * step


@triton.jit
def _finish_q(
    grad_q, lse, statistics, rows, acc, mean, total, excess, delta, scale, pairs, heads, bh, n,
    PRECISE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Stores dQ and the statistics of a tile. `total`: sum of the weights; `mean`: sum of the weighted keys; `excess`:
    sum of the gradients of the scores, which would be 0 if delta had the same rounding error as dP.
    """
    if PRECISE:
        correction = excess / total
        acc = (acc - mean * correction[:, None]) / total[:, None]
        delta += correction
    store_rows(grad_q, heads, bh, rows, acc * scale, HEAD_DIM, D)
    lse_log2 = tl.load(lse + bh.to(tl.int64) * n + rows, rows >= 0, 0.0) * LOG2E
    lse_at, delta_at, total_at = _statistics_at(statistics, pairs, bh, n, rows)
    tl.store(lse_at, lse_log2, rows >= 0)
    tl.store(delta_at, delta, rows >= 0)
    tl.store(total_at, total, rows >= 0)


@triton.jit
def _combine_q(
    grad_q, lse, statistics, partials, plan, scale, pairs, heads, n,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = grad_q.data.dtype.element_ty == tl.float32
    bh = tl.program_id(0) % pairs
    tile, first, count = split_tile(plan, tl.program_id(0) // pairs)
    delta, total, excess = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    acc, mean = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, D], tl.float32)
    for i in range(count):
        number = ((first + i).to(tl.int64) * pairs + bh) * (1 + PRECISE)
        part, part_total, delta = _saved(partials, number, ROWS, D)
        acc += part
        total += part_total
        if PRECISE:
            part, part_excess, _ = _saved(partials, number + 1, ROWS, D)
            mean += part
            excess += part_excess
    rows = row_tokens(plan, tile, ROWS)
    _finish_q(
        grad_q, lse, statistics, rows, acc, mean, total, excess, delta, scale, pairs, heads, bh, n,
        PRECISE, HEAD_DIM, D,
    )  # fmt: skip


# -- dK and dV, by tiles of keys


@triton.jit
def _grad_kv(
    q, k, v, grad_out, statistics, grad_k, grad_v, partials, plan, scale, pairs, heads, n,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = q.data.dtype.element_ty == tl.float32
    item, bh = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    tile, begin, end, partial = work_item(plan, item)
    rows = row_tokens(plan, tile, ROWS)
    k_rows = load_rows(k, heads, bh, rows, HEAD_DIM, D)
    v_rows = load_rows(v, heads, bh, rows, HEAD_DIM, D)

    entries, gathered, masks = sections(plan)
    scale_log2 = scale * LOG2E
    acc_k = tl.zeros([ROWS, D], tl.float32)
    acc_v = tl.zeros([ROWS, D], tl.float32)
    for e in tl.range(begin, end):
        tokens, mask = read_entry(entries, gathered, e, COLUMNS)
        q_rows = load_rows(q, heads, bh, tokens, HEAD_DIM, D)
        grad_rows = load_rows(grad_out, heads, bh, tokens, HEAD_DIM, D)
        lse_at, delta_at, total_at = _statistics_at(statistics, pairs, bh, n, tokens)
        lse_log2, delta = tl.load(lse_at, tokens >= 0, 0.0), tl.load(delta_at, tokens >= 0, 0.0)
        scores = tl.dot(k_rows, tl.trans(q_rows), input_precision="ieee")
        weights = exp2(scores * scale_log2 - lse_log2[None, :], PRECISE)
        if PRECISE:
            weights = weights / tl.load(total_at, tokens >= 0, 1.0)[None, :]
        grad_scores = weights * (tl.dot(v_rows, tl.trans(grad_rows), input_precision="ieee") - delta[None, :])
        if mask >= 0:
            weights = where_allowed(weights, 0.0, masks, mask, ROWS, COLUMNS)
            grad_scores = where_allowed(grad_scores, 0.0, masks, mask, ROWS, COLUMNS)
        acc_v = tl.dot(weights.to(grad_rows.dtype), grad_rows, acc_v, input_precision="ieee")
        acc_k = tl.dot(grad_scores.to(q_rows.dtype), q_rows, acc_k, input_precision="ieee")

    if partial >= 0:
        _save_kv(partials, partial.to(tl.int64) * pairs + bh, acc_k, acc_v, ROWS, D)
    else:
        store_rows(grad_k, heads, bh, rows, acc_k * scale, HEAD_DIM, D)
        store_rows(grad_v, heads, bh, rows, acc_v, HEAD_DIM, D)


@triton.jit
def _kv_at(partials, number, ROWS: tl.constexpr, D: tl.constexpr):
    at = partials + number * (2 * ROWS * D) + tl.arange(0, ROWS)[:, None] * D + tl.arange(0, D)[None, :]
    return at, at + ROWS * D


@triton.jit
def _save_kv(partials, number, acc_k, acc_v, ROWS: tl.constexpr, D: tl.constexpr):
    k_at, v_at = _kv_at(partials, number, ROWS, D)
    tl.store(k_at, acc_k)
    tl.store(v_at, acc_v)


@triton.jit
def _combine_kv(
    grad_k, grad_v, partials, plan, scale, pairs, heads, n, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr
):
    bh = tl.program_id(0) % pairs
    tile, first, count = split_tile(plan, tl.program_id(0) // pairs)
    acc_k = tl.zeros([ROWS, D], tl.float32)
    acc_v = tl.zeros([ROWS, D], tl.float32)
    for i in range(count):
        k_at, v_at = _kv_at(partials, (first + i).to(tl.int64) * pairs + bh, ROWS, D)
        acc_k += tl.load(k_at)
        acc_v += tl.load(v_at)
    rows = row_tokens(plan, tile, ROWS)
    store_rows(grad_k, heads, bh, rows, acc_k * scale, HEAD_DIM, D)
    store_rows(grad_v, heads, bh, rows, acc_v, HEAD_DIM, D)


# -- the operations

COMBINE_WARPS = 8


class _Problem:
    """The arguments shared by all kernels of a call."""

    def __init__(self, q, scale):
        batch, self.heads, self.n, self.head_dim = q.shape
        self.q, self.scale, self.pairs, self.dim = q, scale, batch * self.heads, launch.padded(self.head_dim)

    def partials(self, sizes, vectors):
        """Scratch memory for the partial results of a plan of `sizes`, each of `vectors` float32 vectors [ROWS]."""
        return self.q.new_empty(sizes.partials * self.pairs * sizes.rows * vectors, dtype=torch.float32)

    def start(self, kernel, name, sizes, *arguments, scale, **constants):
        """Launches a kernel on the work items of a plan, with the parameters of `name` in the table."""
        line = launch.lookup(name, self.q.device, self.head_dim, self.q.dtype)
        numbers = scale, self.pairs, self.heads, self.n
        shape = dict(HEAD_DIM=self.head_dim, D=self.dim, ROWS=sizes.rows, COLUMNS=sizes.columns)
        blocks = self.pairs * sizes.items
        launch.start(kernel, blocks, line.warps, line.stages, *arguments, *numbers, **shape, **constants)

    def combine(self, kernel, sizes, *arguments, scale):
        """Launches a kernel on the split tiles of a plan."""
        numbers = scale, self.pairs, self.heads, self.n
        shape = dict(HEAD_DIM=self.head_dim, D=self.dim, ROWS=sizes.rows)
        launch.start(kernel, self.pairs * sizes.split_tiles, COMBINE_WARPS, 1, *arguments, *numbers, **shape)


def _of_plans(sizes):
    half = len(sizes) // 2
    return PlanSizes(*sizes[:half]), PlanSizes(*sizes[half:])


def _sparse_attention(q, k, v, plan, backward_plan, sizes, scale, *options):
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    problem, (sizes, _) = _Problem(q, scale), _of_plans(sizes)
    partials = problem.partials(sizes, problem.dim + 2)
    positive = max(abs(scale), 4 * torch.finfo(torch.float32).tiny)  # never 0: -inf * 0 is NaN
    results = Matrices.of(out), lse, partials, plan
    tensors = (Matrices.of(x) for x in (q, k, v))
    problem.start(_forward, "sparse_attention", sizes, *tensors, *results, scale=positive, NEGATE=scale < 0)
    problem.combine(_combine, sizes, *results, scale=positive)
    return out, lse


def _sparse_attention_backward(grad_out, q, k, v, out, lse, plan, backward_plan, sizes, scale, *options):
    grads = [torch.empty_like(x) for x in (q, k, v)]
    problem, (sizes, key_sizes) = _Problem(q, scale), _of_plans(sizes)
    statistics = q.new_empty(3, problem.pairs, problem.n, dtype=torch.float32)
    q, k, v, out, grad_out, grad_q, grad_k, grad_v = map(Matrices.of, (q, k, v, out, grad_out, *grads))

    precise = 1 + (q.data.dtype == torch.float32)
    results = grad_q, lse, statistics, problem.partials(sizes, (problem.dim + 2) * precise), plan
    problem.start(_grad_q, "sparse_attention.grad_q", sizes, q, k, v, out, grad_out, *results, scale=scale)
    problem.combine(_combine_q, sizes, *results, scale=scale)

    partials = problem.partials(key_sizes, 2 * problem.dim)
    inputs = q, k, v, grad_out, statistics
    results = grad_k, grad_v, partials, backward_plan
    problem.start(_grad_kv, "sparse_attention.grad_kv", key_sizes, *inputs, *results, scale=scale)
    problem.combine(_combine_kv, key_sizes, *results, scale=scale)
    return tuple(grads)


OPTIONS = "Tensor? text_lengths, Tensor? seed, float dropout_p, int head_offset"  # of the shared gradient; refused

_op = register(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor plan, Tensor backward_plan, int[] sizes, float scale,"
    f" {OPTIONS}) -> (Tensor, Tensor)",
    _sparse_attention,
    shared.fake,
)
_backward_op = register(
    "sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor plan,"
    f" Tensor backward_plan, int[] sizes, float scale, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _sparse_attention_backward,
    shared.fake_backward,
)
sparse_attention = shared.register_autograd(_op, _backward_op, launch.tiles)
