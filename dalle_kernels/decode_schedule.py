"""Decode schedules: a pattern compiled for generating an image one token at a time.

Step s computes image token s. Every image key has a slot in the cache: its rank in the pattern's decode order modulo R,
the smallest R such that no key is overwritten while a later query still needs it. Row attention thus keeps 33 of 1024
keys, and each step reads a few runs of consecutive slots. A schedule is one int32 tensor, in the same format for every
backend:

    header [16]    magic, version, text_len, steps, slots (R), number of runs, where steps and runs begin in the tensor,
                   total length; the rest is 0
    steps          [steps, 5]   slot of the step's own key; first image run, image runs; first text run, text runs
    runs           [runs, 2]    begin, length: ascending slots of the image cache (the step's own among them), or text
                   positions; equal lists of runs are stored once

Text that is decoded one token at a time has a schedule of its own, in which the text is the image: step t computes text
token t, its key has slot t, and there is no text before it.

Schedules are compiled by streaming over blocks of queries; no N x N matrix is ever made.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from .compile import plain_tensors
from .patterns import AttentionPattern

MAGIC, VERSION, HEADER_WORDS, STEP_WORDS = 0x4443444B, 1, 16, 5
_BLOCK = 128  # queries per block of the compiler


class ScheduleHeader(IntEnum):
    """Words of the header; csrc/common/decode_schedule.h has the same list."""

    MAGIC = 0
    VERSION = 1
    TEXT_LEN = 2
    STEPS = 3
    SLOTS = 4
    RUNS = 5
    STEPS_AT = 6
    RUNS_AT = 7
    LENGTH = 8


@dataclass(frozen=True)
class DecodeSchedule:
    """A compiled schedule. Kernels read `packed`; `steps` and `runs` are views of it, for tests and inspection."""

    packed: np.ndarray
    steps: np.ndarray
    runs: np.ndarray

    @property
    def slots(self) -> int:
        """R, the number of image keys a sequence keeps per head."""
        return int(self.packed[ScheduleHeader.SLOTS])

    def image_slots(self, step: int) -> np.ndarray:
        """The cache slots that `step` reads, ascending."""
        return self._expand(*self.steps[step, 1:3])

    def text_keys(self, step: int) -> np.ndarray:
        """The text positions that `step` reads, ascending."""
        return self._expand(*self.steps[step, 3:5])

    def _expand(self, first, count):
        runs = self.runs[first : first + count]
        return np.concatenate([np.arange(begin, begin + length) for begin, length in runs] or [np.arange(0)])

    def surviving(self, tokens: int) -> np.ndarray:
        """The image tokens among the first `tokens` whose slots none of the others overwrites."""
        slots = self.steps[:tokens, 0][::-1]
        return np.sort(tokens - 1 - np.unique(slots, return_index=True)[1])


@functools.lru_cache(maxsize=256)
def compile_schedule(pattern: AttentionPattern) -> DecodeSchedule:
    """Compiles the schedule of all image tokens of `pattern`; cached.

    Raises:
        ValueError: the schedule is too large for int32.
    """
    text = pattern.text_len
    with plain_tensors():
        order = pattern.decode_order().numpy()
    order = order[order >= text] - text
    slots = _fewest_slots(order, _last_use(pattern))
    slot = np.empty(len(order), np.int64)
    slot[order] = np.arange(len(order)) % slots
    return _compile(_blocks(pattern, text, pattern.seq_len), text, slots, slot)


@functools.lru_cache(maxsize=256)
def compile_text_schedule(pattern: AttentionPattern) -> DecodeSchedule:
    """Compiles the schedule of all text tokens of `pattern`; cached.

    Raises:
        ValueError: the schedule is too large for int32.
    """
    text = pattern.text_len
    return _compile(_blocks(pattern, 0, text), 0, text, np.arange(text))


def _compile(blocks, text, slots, slot):
    """The schedule of the queries in `blocks`: their first `text` keys are text, the others have the slots `slot`."""
    steps, runs, known = [], [], {}

    def add(places):
        """Stores ascending `places` as runs, equal lists once; returns (first run, number of runs)."""
        edges = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        pairs = np.stack([places[edges], np.diff(edges, append=len(places))], 1).astype(np.int32)
        first = known.setdefault(pairs.tobytes(), len(runs))
        if first == len(runs):
            runs.extend(pairs)
        return first, len(pairs)

    for rows in blocks:
        for row in rows:
            image = np.sort(slot[np.flatnonzero(row[text:])])
            steps.append((slot[len(steps)], *add(image), *add(np.flatnonzero(row[:text]))))
    tables = (np.array(rows, np.int32).reshape(-1, width) for rows, width in ((steps, STEP_WORDS), (runs, 2)))
    return _pack(text, slots, *tables)


def _blocks(pattern, first, stop):
    """The rows of the queries [first, stop), in blocks: bool [queries, tokens up to the last of these queries]."""
    for begin in range(first, stop, _BLOCK):
        end = min(begin + _BLOCK, stop)
        yield pattern.allowed(np.arange(begin, end, dtype=np.int32)[:, None], np.arange(end, dtype=np.int32)[None, :])


def _last_use(pattern):
    """The last step that reads each image key: int64 [steps]."""
    last = np.zeros(pattern.seq_len - pattern.text_len, np.int64)
    step = 0
    for rows in _blocks(pattern, pattern.text_len, pattern.seq_len):
        image = rows[:, pattern.text_len :]
        latest = step + len(image) - 1 - image[::-1].argmax(0)
        np.copyto(last[: image.shape[1]], latest, where=image.any(0))
        step += len(image)
    return last


def _fewest_slots(order, last):
    """The smallest R such that keys with equal ranks modulo R are never live at the same time.

    Args:
        order: the key of each rank.
        last: the last step that reads each key.
    """
    count = len(order)
    first, final = order, last[order]
    change = np.bincount(first, minlength=count + 1) - np.bincount(final + 1, minlength=count + 1)
    most_alive = int(np.cumsum(change).max())

    def clash(lag):
        return bool(((first[lag:] <= final[:-lag]) & (first[:-lag] <= final[lag:])).any())

    fits = (slots for slots in range(most_alive, count) if not any(clash(lag) for lag in range(slots, count, slots)))
    return next(fits, count)


def _pack(text_len, slots, steps, runs):
    steps_at, runs_at = HEADER_WORDS, HEADER_WORDS + steps.size
    total = runs_at + runs.size
    if total >= 2**31:
        raise ValueError(f"the decode schedule of this pattern needs {total} words, too many; use a sparser pattern")
    packed = np.zeros(total, np.int32)
    packed[list(ScheduleHeader)] = MAGIC, VERSION, text_len, len(steps), slots, len(runs), steps_at, runs_at, total
    packed[steps_at:runs_at] = steps.reshape(-1)
    packed[runs_at:] = runs.reshape(-1)
    return DecodeSchedule(packed, packed[steps_at:runs_at].reshape(steps.shape), packed[runs_at:].reshape(runs.shape))
