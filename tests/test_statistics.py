"""The p-values of the statistical tests."""

import math

import pytest
import torch

from statistics_for_tests import REJECT, binomial_p, frequencies_p, normal_std_p


def mass(trials, p):
    return [math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(trials + 1)]


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 0.5, 1.0])
def test_binomial_tails_are_sums(p):
    for k in range(21):
        expected = min(1, 2 * min(sum(mass(20, p)[: k + 1]), sum(mass(20, p)[k:])))
        assert binomial_p(k, 20, p) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_a_true_hypothesis_is_rejected_at_most_as_often_as_said():
    for p in (0.02, 0.4):
        for level in (0.3, 0.05, 1e-3, REJECT):
            assert sum(m for k, m in enumerate(mass(60, p)) if binomial_p(k, 60, p) < level) <= level


def test_large_samples():
    assert binomial_p(500_000, 1_000_000, 0.5) == 1
    assert binomial_p(502_446, 1_000_000, 0.5) == pytest.approx(1e-6, rel=0.01)  # 4.8916 standard deviations


def test_frequencies():
    p = torch.tensor([0.5, 0.3, 0.2 - 1e-5, 1e-5])
    assert frequencies_p((p * 10_000).round().int(), p) == 1
    assert frequencies_p([5000, 3000, 1999, 1], p) > 0.1, "one of a rare class"
    assert frequencies_p([5000, 3000, 1995, 5], p) < REJECT
    assert frequencies_p([5300, 2700, 2000, 0], p) < REJECT
    assert frequencies_p([3, 0], [1.0, 0.0]) == 1 and frequencies_p([3, 1], [1.0, 0.0]) == 0
    assert frequencies_p([60, 40], [0.5, 0.5]) == pytest.approx(2 * binomial_p(60, 100, 0.5))


def test_standard_deviations(seed):
    ten = torch.full((10,), math.sqrt(1.8307038))
    assert normal_std_p(ten, 1) == pytest.approx(0.1, rel=1e-4), "the 95 % point of ten degrees of freedom is 18.307"
    x = torch.randn(20_000) * 0.02
    assert normal_std_p(x, 0.02) > REJECT
    assert normal_std_p(x, 0.021) < REJECT and normal_std_p(x, 0.019) < REJECT
