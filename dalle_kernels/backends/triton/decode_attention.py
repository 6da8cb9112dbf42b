"""decode_attention: one new image token per sequence over the cached keys that the decode schedule lists.

Two kernels. The first processes the text, which the candidates of a prompt share: blocks of candidates are the rows of
matrix products. It stores the online-softmax state in scratch memory. The second has one program per sequence and head.
It writes the new key and value to the cache, starts from them (a token attends to itself), adds the other listed image
keys, and merges the state of the text.

Batch-invariant: a candidate's reduction order does not depend on the other rows. The step is read on the device only,
so that one captured graph serves all steps. Text lengths are refused before the call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...decode_schedule import STEP_WORDS as WORDS_OF_A_STEP
from ...decode_schedule import ScheduleHeader
from . import launch, softmax
from .math import INFINITY, LOG2E
from .matrices import Matrices, load_rows, store_rows
from .registration import register

# -- reading a packed schedule (format: dalle_kernels/decode_schedule.py); `schedule` points to its first word

STEPS = tl.constexpr(int(ScheduleHeader.STEPS))  # words of the header
STEPS_AT = tl.constexpr(int(ScheduleHeader.STEPS_AT))
RUNS_AT = tl.constexpr(int(ScheduleHeader.RUNS_AT))
STEP_WORDS = tl.constexpr(WORDS_OF_A_STEP)
RUNS = tl.constexpr(16)  # runs per iteration


@triton.jit
def _read_step(schedule, step, LIST: tl.constexpr):
    """(slot of the step's own key, pointer to the runs, number of runs) of the list at word LIST of a step. A step
    outside the image gives slot -1 and no runs, since a kernel cannot raise.
    """
    number = tl.load(step)
    inside = (number >= 0) & (number < tl.load(schedule + STEPS))
    words = schedule + tl.load(schedule + STEPS_AT) + tl.where(inside, number, 0) * STEP_WORDS
    runs = schedule + tl.load(schedule + RUNS_AT) + 2 * tl.load(words + LIST)
    return tl.where(inside, tl.load(words), -1), runs, tl.where(inside, tl.load(words + LIST + 1), 0)


@triton.jit
def _read_runs(runs, first, count):
    """(begins, firsts, ends) of the runs `first` to `first` + RUNS: run r holds the positions from begins[r] on, with
    the indices firsts[r] to ends[r].
    """
    r = first + tl.arange(0, RUNS)
    lengths = tl.load(runs + 2 * r + 1, r < count, 0)
    ends = tl.cumsum(lengths, 0)
    return tl.load(runs + 2 * r, r < count, 0), ends - lengths, ends


@triton.jit
def _positions(begins, firsts, ends, index, COLUMNS: tl.constexpr):
    """The positions with indices from `index` on, [COLUMNS]; -1 beyond the last."""
    i = index + tl.arange(0, COLUMNS)[:, None]
    in_run = (firsts[None, :] <= i) & (i < ends[None, :])
    return tl.sum(tl.where(in_run, begins[None, :] + (i - firsts[None, :]) + 1, 0), 1) - 1


# -- the kernels; `scale` is positive, so that the maximum can be taken before scaling


@triton.jit
def _text(
    q, prefix_k, prefix_v, text_out, text_maximum, text_total, schedule, step, scale, heads, candidates, blocks,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The online-softmax state over the text, for ROWS candidates of a prompt and one head."""
    PRECISE: tl.constexpr = q.data.dtype.element_ty == tl.float32
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks  # pair: (prompt, head)
    rows = block * ROWS + tl.arange(0, ROWS)
    rows = tl.where(rows < candidates, rows, -1)
    q_rows = load_rows(q, heads, pair, rows, HEAD_DIM, D)

    scale_log2 = scale * LOG2E
    maximum, total = softmax.empty(ROWS)
    acc = tl.zeros([ROWS, D], tl.float32)
    _, runs, count = _read_step(schedule, step, 3)
    for first in range(0, count, RUNS):
        begins, firsts, ends = _read_runs(runs, first, count)
        for index in tl.range(0, tl.max(ends, 0), COLUMNS):
            tokens = _positions(begins, firsts, ends, index, COLUMNS)
            k_rows = load_rows(prefix_k, heads, pair, tokens, HEAD_DIM, D)
            v_rows = load_rows(prefix_v, heads, pair, tokens, HEAD_DIM, D)
            scores = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
            scores = tl.where(tokens[None, :] >= 0, scores, -INFINITY)
            maximum, total, alpha, weights = softmax.update(maximum, total, scores, scale_log2, PRECISE)
            acc = tl.dot(weights.to(v_rows.dtype), v_rows, acc * alpha[:, None], input_precision="ieee")

    store_rows(text_out, heads, pair, rows, acc, HEAD_DIM, D)
    at = pair.to(tl.int64) * candidates + rows
    tl.store(text_maximum + at, maximum, rows >= 0)
    tl.store(text_total + at, total, rows >= 0)


@triton.jit
def _image(
    q, k, v, image_k, image_v, out, text_out, text_maximum, text_total, schedule, step, scale, heads, candidates,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The image keys of one sequence and head, merged with the text. Tensors have one row, the candidate's."""
    PRECISE: tl.constexpr = q.data.dtype.element_ty == tl.float32
    pair, candidate = tl.program_id(0) // candidates, tl.program_id(0) % candidates
    row = tl.full([1], candidate, tl.int32)
    q_row = load_rows(q, heads, pair, row, HEAD_DIM, D).to(tl.float32)
    k_row = load_rows(k, heads, pair, row, HEAD_DIM, D)
    v_row = load_rows(v, heads, pair, row, HEAD_DIM, D)

    cached = (pair // heads * candidates + candidate) * heads + pair % heads
    own, runs, count = _read_step(schedule, step, 1)
    own_slot = tl.full([1], own, tl.int32)
    store_rows(image_k, heads, cached, own_slot, k_row, HEAD_DIM, D)
    store_rows(image_v, heads, cached, own_slot, v_row, HEAD_DIM, D)

    scale_log2 = scale * LOG2E
    maximum = tl.sum(q_row * k_row.to(tl.float32), 1)
    total = tl.full([1], 1.0, tl.float32)
    acc = v_row.to(tl.float32)
    for first in range(0, count, RUNS):
        begins, firsts, ends = _read_runs(runs, first, count)
        for index in tl.range(0, tl.max(ends, 0), COLUMNS):
            slots = _positions(begins, firsts, ends, index, COLUMNS)
            slots = tl.where(slots == own, -1, slots)
            k_rows = load_rows(image_k, heads, cached, slots, HEAD_DIM, D).to(tl.float32)
            v_rows = load_rows(image_v, heads, cached, slots, HEAD_DIM, D).to(tl.float32)
            scores = tl.where(slots >= 0, tl.sum(q_row * k_rows, 1), -INFINITY)[None, :]
            maximum, total, alpha, weights = softmax.update(maximum, total, scores, scale_log2, PRECISE)
            acc = acc * alpha[:, None] + tl.sum(tl.trans(weights) * v_rows, 0)[None, :]

    at = pair.to(tl.int64) * candidates + row
    of_text, total_of_text = tl.load(text_maximum + at), tl.load(text_total + at)
    _, total, alpha, beta = softmax.merge(maximum, total, of_text, total_of_text, scale_log2, PRECISE)
    text_acc = load_rows(text_out, heads, pair, row, HEAD_DIM, D)
    acc = (acc * alpha[:, None] + text_acc * beta[:, None]) / total[:, None]
    acc = tl.where(own >= 0, acc, float("nan"))  # a step outside the image
    store_rows(out, heads, pair, row, acc, HEAD_DIM, D)


# -- the operation


def _decode_attention(q, k, v, prefix_k, prefix_v, image_k, image_v, schedule, step, scale, text_lengths=None):
    prompts, heads, _, head_dim = prefix_k.shape
    candidates = q.shape[0] // prompts
    out = q.new_empty(q.shape)
    text_out = q.new_empty(prompts, heads, candidates, head_dim, dtype=torch.float32)
    statistics = q.new_empty(2, prompts, heads, candidates, dtype=torch.float32)

    def of_prompts(x):
        """A tensor [P * C, H, D] as [P, H, C, D]."""
        return Matrices.of(x.unflatten(0, (prompts, candidates)).transpose(1, 2))

    q_rows, text = of_prompts(q), (Matrices.of(text_out), *statistics)
    shape = dict(HEAD_DIM=head_dim, D=launch.padded(head_dim))

    line = launch.lookup("decode_attention.text", q.device, head_dim, q.dtype)
    prefix, blocks = (Matrices.of(prefix_k), Matrices.of(prefix_v)), -(-candidates // line.rows)
    launch.start(
        _text, prompts * heads * blocks, line.warps, line.stages,
        q_rows, *prefix, *text, schedule, step, scale, heads, candidates, blocks,
        ROWS=line.rows, COLUMNS=line.columns, **shape,
    )  # fmt: skip

    line = launch.lookup("decode_attention.image", q.device, head_dim, q.dtype)
    new, image = (of_prompts(k), of_prompts(v)), (Matrices.of(image_k), Matrices.of(image_v))
    launch.start(
        _image, prompts * heads * candidates, line.warps, line.stages,
        q_rows, *new, *image, of_prompts(out), *text, schedule, step, scale, heads, candidates,
        COLUMNS=line.columns, **shape,
    )  # fmt: skip
    return out


def _fake(q, k, v, prefix_k, prefix_v, image_k, image_v, schedule, step, scale, text_lengths=None):
    return q.new_empty(q.shape)


decode_attention = register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor(a!) image_k,"
    " Tensor(b!) image_v, Tensor schedule, Tensor step, float scale, Tensor? text_lengths=None) -> Tensor",
    _decode_attention,
    _fake,
)
