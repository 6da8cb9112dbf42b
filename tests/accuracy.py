"""The error bound for the results of every backend."""

import torch

LEAD = 6  # a test fails once it has this many more misses than passes
ratios = None  # with `make fuzz` a list: assert_accurate appends (what, error / allowed error) and never fails


class Inaccurate(AssertionError):
    """The error of a result exceeds the bound."""


def mostly(trial):
    """Repeats trial(), with new random numbers each time, until more trials have passed than were Inaccurate. Fails
    once LEAD more were Inaccurate than passed. conftest.py applies this to every test.

    The largest error of a gradient comes from the one or two rows that a single key dominates, so its ratio to plain
    PyTorch's is a matter of chance: even with equal error distributions, a trial occasionally misses the bound. If a
    trial misses with probability m, this sequential test fails with probability r^6 (1 - r) / (1 - r^7), where r = m /
    (1 - m) (gambler's ruin): 9e-10 for m = 3 %, typical of a float32 gradient of q; 2.6e-7 for 7.5 %, the largest m
    measured; 0.89 for 90 %; and 1 if every trial misses, as with a wrong kernel. Most tests end after the first trial.
    """
    lead = 0
    while lead <= 0:
        try:
            trial()
            lead += 1
        except Inaccurate as error:
            lead -= 1
            if lead == -LEAD:
                raise AssertionError(f"{LEAD} more trials miss the bound than pass; the last: {error}") from error


def assert_accurate(actual, exact, plain, what):
    """Asserts that the largest error of `actual` against the float64 `exact` is at most twice that of `plain`, plain
    PyTorch in actual's dtype, plus one rounding of the output. `what` names the result: backend, operation, tensor,
    dtype.

    Raises:
        Inaccurate: the error exceeds the bound.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    error = (actual.double() - exact).abs().max().item() if actual.numel() else 0.0
    plain_error = (plain.double() - exact).abs().max().item() if actual.numel() else 0.0
    rounding = torch.finfo(actual.dtype).eps / 2 * (exact.abs().max().item() if actual.numel() else 0.0)
    allowed = 2 * plain_error + rounding
    if ratios is not None:
        ratios.append((what, error / allowed if allowed else float("inf") if error else 0.0))
    elif not error <= allowed:
        raise Inaccurate(f"{what}: error {error:.3g}, plain PyTorch's {plain_error:.3g}, rounding {rounding:.3g}")


def distribution(ratios):
    """A table of (what, ratio) pairs: for every `what` the quantiles of the ratios and the fraction above 1."""
    groups = {}
    for what, ratio in ratios:
        groups.setdefault(what, []).append(ratio)
    width = max(map(len, groups))
    lines = [f"{'error / allowed error':{width}}   draws  median     p90     p99     max  over 1"]
    for what, found in sorted(groups.items()):
        found.sort()
        quantiles = (found[int(q * (len(found) - 1))] for q in (0.5, 0.9, 0.99, 1))
        over = sum(ratio > 1 for ratio in found) / len(found)
        lines.append(f"{what:{width}}{len(found):8}" + "".join(f"{x:8.3f}" for x in quantiles) + f"{over:8.2%}")
    return "\n".join(lines)
