"""The accuracy rule of every backend, stated once."""

import torch

LEAD = 6  # of misses over holds, at which a test fails
ratios = None  # with `make fuzz` a list: assert_accurate appends (what, error / allowed error) and no miss is a failure


class Inaccurate(AssertionError):
    """A result errs more than the rule allows."""


def mostly(trial):
    """Repeats trial(), which draws new random numbers each time, until more of the trials hold than are Inaccurate.
    Fails once LEAD more are Inaccurate than hold. conftest.py does this for every test, as a whole.

    The largest error of a gradient comes from the one or two rows that a single key dominates, so its ratio to plain
    PyTorch's is chance: even where all errors have the same distribution, a draw misses the rule now and then. If a
    draw misses with probability m, this sequential test fails with probability r^6 (1 - r) / (1 - r^7), r = m / (1 - m)
    (gambler's ruin): 9e-10 for m = 3 %, as usual for a float32 gradient of q; 2.6e-7 for 7.5 %, the largest m measured;
    0.89 for 90 %; and 1 if every draw misses, as those of a wrong kernel do. Most tests end with the first draw.
    """
    lead = 0
    while lead <= 0:
        try:
            trial()
            lead += 1
        except Inaccurate as error:
            lead -= 1
            if lead == -LEAD:
                raise AssertionError(f"{LEAD} more draws miss the bound than hold; the last: {error}") from error


def assert_accurate(actual, exact, plain, what):
    """`actual` may err from the float64 `exact` at most twice as much as `plain`, plain PyTorch in actual's dtype,
    plus one rounding of the output. `what` names the result: backend, operation, tensor, dtype.
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
    """A table of (what, ratio) pairs: per `what` the quantiles of the ratios and the share of them over 1."""
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
