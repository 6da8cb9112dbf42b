"""The accuracy rule of every backend, stated once."""

import torch


class Inaccurate(AssertionError):
    """A result errs more than the rule allows."""


def mostly(trial):
    """Runs trial(), which draws fresh numbers; if it is Inaccurate, four times more, and most of the five must not be.
    conftest.py does this for every test, as a whole.

    The largest error of a gradient comes from the one or two rows that a single key dominates, so its ratio to plain
    PyTorch's is chance: even where all errors have the same distribution, one trial in twenty or so misses the rule. A
    result that is wrong misses it every time.
    """
    misses = []
    for _ in range(5):
        try:
            trial()
        except Inaccurate as error:
            misses.append(error)
        if not misses:
            return
        if len(misses) == 3:
            raise misses[-1]


def assert_accurate(actual, exact, plain):
    """`actual` may err from the float64 `exact` at most twice as much as `plain`, plain PyTorch in actual's dtype,
    plus one rounding of the output.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    error = (actual.double() - exact).abs().max().item() if actual.numel() else 0.0
    plain_error = (plain.double() - exact).abs().max().item() if actual.numel() else 0.0
    rounding = torch.finfo(actual.dtype).eps / 2 * (exact.abs().max().item() if actual.numel() else 0.0)
    if not error <= 2 * plain_error + rounding:
        raise Inaccurate(f"error {error:.3g}, plain PyTorch's {plain_error:.3g}, rounding {rounding:.3g}")
