"""Decode schedules against a cache simulated in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_kernels as dk
from dalle_kernels.backends.plans import schedule_tensor
from dalle_kernels.decode_schedule import compile_schedule, compile_text_schedule
from patterns_for_tests import NAMES, every_pattern

P = dk.AttentionPattern


@pytest.mark.parametrize(
    ("pattern", "slots"),
    [
        (P.row(256, (32, 32)), 33),
        (P.column(256, (32, 32)), 1023),  # the last token's key may reuse the slot of the first, no longer needed
        (P.conv(256, (32, 32)), 192),
        (P.conv(256, (32, 32), edge="clip"), 166),
        (P.conv(256, (32, 32), edge="torus"), 1024),
        (P.axial_row(256, (32, 32)), 32),
        (P.causal(256, (32, 32)), 1024),
    ],
)
def test_slots_at_the_papers_size(pattern, slots):
    assert compile_schedule(pattern).slots == slots


def play(pattern, slot_of, reads):
    """Simulates a cache in which step s writes token s to slot_of(s).

    Returns whether every step reads exactly the tokens of the pattern's row.
    """
    text, held = pattern.text_len, {}
    for step in range(pattern.seq_len - text):
        held[slot_of(step)] = step
        needed = set(pattern.dense(text + step, text + step + 1)[0, text:].nonzero().flatten().tolist())
        if {held.get(slot) for slot in reads(step, needed)} != needed:
            return False
    return True


@settings(max_examples=40)
@given(
    text_len=st.integers(0, 9),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 2**31),
)
def test_schedule_reads_the_row_from_the_fewest_slots(text_len, grid, name, seed):
    torch.manual_seed(seed)
    pattern = every_pattern(text_len, grid)[name]
    schedule = compile_schedule(pattern)
    order = [token - text_len for token in pattern.decode_order().tolist() if token >= text_len]
    assert play(pattern, lambda step: schedule.steps[step, 0], lambda step, needed: schedule.image_slots(step).tolist())
    for slots in range(1, schedule.slots):
        place = {token: rank % slots for rank, token in enumerate(order)}
        assert not play(pattern, place.get, lambda step, needed, place=place: [place[token] for token in needed])
    for step in range(grid[0] * grid[1]):
        row = pattern.dense(text_len + step, text_len + step + 1)[0, :text_len]
        assert schedule.text_keys(step).tolist() == row.nonzero().flatten().tolist()


@pytest.mark.parametrize("name", NAMES)
def test_text_tokens_are_their_own_slots(name, seed):
    pattern = every_pattern(9, (3, 4))[name]
    schedule = compile_text_schedule(pattern)
    assert schedule.slots == 9 and schedule.steps[:, 0].tolist() == list(range(9))
    for step, row in enumerate(pattern.dense(0, 9)):
        assert schedule.image_slots(step).tolist() == row.nonzero().flatten().tolist()
        assert not len(schedule.text_keys(step))


@pytest.mark.parametrize("name", NAMES)
def test_runs_are_ascending_and_apart(name, seed):
    schedule = compile_schedule(every_pattern(5, (7, 6))[name])
    for first, count in [*schedule.steps[:, 1:3], *schedule.steps[:, 3:5]]:
        runs = schedule.runs[first : first + count]
        assert (runs[:, 1] > 0).all() and (runs[1:, 0] > runs[:-1].sum(1)).all()


def test_equal_patterns_share_a_schedule():
    a, b = (schedule_tensor(P.row(3, (4, 5)), torch.device("cpu")) for _ in range(2))
    assert a is b and a.dtype == torch.int32
