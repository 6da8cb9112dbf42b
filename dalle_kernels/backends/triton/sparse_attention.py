"""sparse_attention: softmax(q kᵀ · scale) v over the pairs of a plan, forward and backward. docs/triton.md explains it.

Forward: a program takes one work item of the plan for one (batch, head), and runs softmax over its keys, online over
groups of columns. Where several items share a tile, each leaves a partial result, and a second kernel adds these up in
the plan's order.

Backward, from lse, without atomics. With P = exp(S * scale - lse) and dP = dO Vᵀ:
    dQ = dS K * scale,  dK = dSᵀ Q * scale,  dV = Pᵀ dO,  where dS = P * (dP - delta),  delta = rowsum(dO * O).
One kernel owns tiles of queries and gives dQ, another owns tiles of keys and gives dK and dV, on a plan seen from the
keys. lse is rounded, by more the larger it is, and that error multiplies every weight of a query. In float32 it would
show: there the first kernel also adds up the weights that it recomputes, and both divide by the sum; and it corrects
delta, so that it has the rounding errors of dP.
"""

from __future__ import annotations

import operator

import torch
import triton
import triton.language as tl

from ...compile import constant_result
from ...plan import plan_tensor
from .. import sparse_attention as shared
from . import launch
from .math import INFINITY, LOG2E, exp2, finite
from .matrices import Matrices, load_rows, store_rows
from .plan import parts, read_entry, row_tokens, split_tile, where_allowed, work_item
from .registration import register

# -- forward


@triton.jit
def _forward(
    q, k, v, out, lse, partials, plan, scale, pairs, heads, n, NEGATE: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`scale` is positive, so that maxima can be of scores before they are scaled; NEGATE: it was negative."""
    PRECISE: tl.constexpr = q.data.dtype.element_ty == tl.float32
    item, bh = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    tile, begin, end, partial = work_item(plan, item)
    rows = row_tokens(plan, tile, ROWS)
    q_rows = load_rows(q, heads, bh, rows, HEAD_DIM, D)
    if NEGATE:
        q_rows = -q_rows

    entries, gathered, masks = parts(plan)
    scale_log2 = scale * LOG2E
    maximum = tl.full([ROWS], -INFINITY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for e in tl.range(begin, end):
        tokens, mask = read_entry(entries, gathered, e, COLUMNS)
        k_rows = load_rows(k, heads, bh, tokens, HEAD_DIM, D)
        scores = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
        if mask >= 0:
            scores = where_allowed(scores, -INFINITY, masks, mask, ROWS, COLUMNS)
        new = tl.maximum(maximum, tl.max(scores, 1))
        less = finite(new)
        keep = exp2((maximum - less) * scale_log2, PRECISE)
        if PRECISE:
            weights = exp2((scores - less[:, None]) * scale_log2, PRECISE)
        else:  # one multiply-add
            weights = exp2(scores * scale_log2 - (less * scale_log2)[:, None], PRECISE)
        maximum, total = new, total * keep + tl.sum(weights, 1)
        v_rows = load_rows(v, heads, bh, tokens, HEAD_DIM, D)
        acc = tl.dot(weights.to(v_rows.dtype), v_rows, acc * keep[:, None], input_precision="ieee")

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
    """A partial result in scratch memory: acc [ROWS, D], x [ROWS] and y [ROWS], float32."""
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
    """Adds up the partial results of a split tile."""
    bh = tl.program_id(0) % pairs
    tile, first, count = split_tile(plan, tl.program_id(0) // pairs)
    maximum = tl.full([ROWS], -INFINITY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for i in range(count):
        part, part_maximum, part_total = _saved(partials, (first + i).to(tl.int64) * pairs + bh, ROWS, D)
        new = tl.maximum(maximum, part_maximum)
        less = finite(new)
        keep = exp2((maximum - less) * (scale * LOG2E), True)
        weight = exp2((part_maximum - less) * (scale * LOG2E), True)
        maximum, total = new, total * keep + part_total * weight
        acc = acc * keep[:, None] + part * weight[:, None]
    rows = row_tokens(plan, tile, ROWS)
    _finish(out, lse, rows, acc, maximum, total, scale, heads, bh, n, HEAD_DIM, D)


# -- dQ, by tiles of queries; and what the other kernel must know of a query


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

    entries, gathered, masks = parts(plan)
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
    """Of a square product of rows like dO Vᵀ: so that dP - delta is exactly 0 where a query sees one key."""
    i = tl.arange(0, x.shape[0])
    return tl.sum(tl.where(i[:, None] == i[None, :], x, 0.0), 1)


@triton.jit
def _statistics_at(statistics, pairs, bh, n, tokens):
    """Where lse (to base 2), delta, and the sum of the recomputed weights of the queries `tokens` stand."""
    at = statistics + bh.to(tl.int64) * n + tokens
    step = tl.full([1], pairs, tl.int64) * n  # pairs may be the constant 1
    return at, at + step, at + 2 * step


@triton.jit
def _finish_q(
    grad_q, lse, statistics, rows, acc, mean, total, excess, delta, scale, pairs, heads, bh, n,
    PRECISE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """`total`: the sum of the weights, `mean`: of the weighted keys, `excess`: of the gradients of the scores, which
    would be 0 if delta had the rounding errors of dP.
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

    entries, gathered, masks = parts(plan)
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

SIZES = 5  # of a plan: rows, columns, work items, partial results, split tiles
COMBINE_WARPS = 8


def sparse_attention(q, k, v, pattern, scale):
    """(out, lse) of already checked tensors."""
    q, k, v = (shared.rows_contiguous(x) for x in (q, k, v))
    # index(): a plan is for one length, also under dynamic shapes
    plan, backward_plan, sizes = _plans(pattern, operator.index(q.shape[2]), q.device, q.shape[3], q.dtype)
    return _op(q, k, v, plan, backward_plan, sizes, scale)


@constant_result
def _plans(pattern, n, device, head_dim, dtype):
    """The plan seen from the queries, that seen from the keys, and the SIZES of both."""
    plans, sizes = [], []
    for side, kernel in (("query", "sparse_attention"), ("key", "sparse_attention.grad_kv")):
        shape = launch.lookup(kernel, device, head_dim, dtype).tile_shape
        plan, (_, *counts) = plan_tensor(pattern, n, device, shape, side)
        plans.append(plan)
        sizes += [shape.rows, shape.columns, *counts]
    return *plans, sizes


class _Problem:
    """What all kernels of a call share."""

    def __init__(self, q, scale):
        batch, self.heads, self.n, self.head_dim = q.shape
        self.q, self.scale, self.pairs, self.dim = q, scale, batch * self.heads, launch.padded(self.head_dim)

    def partials(self, sizes, vectors):
        """Scratch memory for the partial results of a plan of `sizes`, each of so many float32 vectors [ROWS]."""
        rows, _, _, partials, _ = sizes
        return self.q.new_empty(partials * self.pairs * rows * vectors, dtype=torch.float32)

    def start(self, kernel, name, sizes, *arguments, scale, **constants):
        """Starts a kernel on the work items of a plan, as the table says under `name`."""
        rows, columns, items, _, _ = sizes
        line = launch.lookup(name, self.q.device, self.head_dim, self.q.dtype)
        numbers = scale, self.pairs, self.heads, self.n
        shape = dict(HEAD_DIM=self.head_dim, D=self.dim, ROWS=rows, COLUMNS=columns)
        launch.start(kernel, self.pairs * items, line.warps, line.stages, *arguments, *numbers, **shape, **constants)

    def combine(self, kernel, sizes, *arguments, scale):
        """Starts a kernel on the split tiles of a plan."""
        rows, _, _, _, split_tiles = sizes
        numbers = scale, self.pairs, self.heads, self.n
        shape = dict(HEAD_DIM=self.head_dim, D=self.dim, ROWS=rows)
        launch.start(kernel, self.pairs * split_tiles, COMBINE_WARPS, 1, *arguments, *numbers, **shape)


def _sparse_attention(q, k, v, plan, backward_plan, sizes, scale):
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    problem, sizes = _Problem(q, scale), sizes[:SIZES]
    partials = problem.partials(sizes, problem.dim + 2)
    positive = max(abs(scale), 4 * torch.finfo(torch.float32).tiny)  # never 0, because -inf is multiplied by it
    results = Matrices.of(out), lse, partials, plan
    tensors = (Matrices.of(x) for x in (q, k, v))
    problem.start(_forward, "sparse_attention", sizes, *tensors, *results, scale=positive, NEGATE=scale < 0)
    problem.combine(_combine, sizes, *results, scale=positive)
    return out, lse


def _sparse_attention_backward(grad_out, q, k, v, out, lse, plan, backward_plan, sizes, scale):
    grads = [torch.empty_like(x) for x in (q, k, v)]
    problem, sizes, key_sizes = _Problem(q, scale), sizes[:SIZES], sizes[SIZES:]
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


_op = register(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor plan, Tensor backward_plan, int[] sizes, float scale)"
    " -> (Tensor, Tensor)",
    _sparse_attention,
    shared.fake,
)
_backward_op = register(
    "sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor plan,"
    " Tensor backward_plan, int[] sizes, float scale) -> (Tensor, Tensor, Tensor)",
    _sparse_attention_backward,
    shared.fake_backward,
)
shared.register_autograd(_op, _backward_op)
