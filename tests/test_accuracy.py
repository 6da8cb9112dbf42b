"""The accuracy rule itself: what is wrong fails, and what misses by chance is tried again."""

import pytest
import torch

from accuracy import Inaccurate, assert_accurate, mostly

CALLS = []


def test_one_miss_in_five_is_chance():
    """conftest.py calls this five times."""
    CALLS.append(0)
    if len(CALLS) == 1:
        raise Inaccurate("the first time")
    assert len(CALLS) <= 5


@pytest.mark.parametrize("misses", [3, 5])
def test_most_of_five_must_hold(misses):
    outcomes = iter([True] * misses + [False] * 5)

    def trial():
        if next(outcomes):
            raise Inaccurate("missed")

    with pytest.raises(Inaccurate):
        mostly(trial)


def test_other_failures_are_not_repeated():
    with pytest.raises(ZeroDivisionError):
        mostly(lambda: 1 / 0)


def test_twice_plain_pytorchs_error_and_a_rounding():
    exact = torch.tensor([1.0, 3.0], dtype=torch.float64)
    plain = (exact + 1e-6).float()
    assert_accurate((exact + 1.9e-6).float(), exact, plain)
    for wrong in (exact + 2.5e-6, exact * torch.nan):
        with pytest.raises(AssertionError):
            assert_accurate(wrong.float(), exact, plain)
