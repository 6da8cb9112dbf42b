"""Statistics of timings, and baselines that may be unavailable."""

from __future__ import annotations

import statistics

import torch


class Unavailable(Exception):
    """Why a baseline cannot be had here."""


def quartiles(values) -> list[float]:
    """First quartile, median, third quartile; single values as they are."""
    values = sorted(values)
    return [values[len(values) // 4], statistics.median(values), values[-1 - len(values) // 4]]


def compiled(function):
    """torch.compile for the sizes at hand, without the limit beyond which it quietly runs functions eagerly."""
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(function, dynamic=False)


def reason(error: BaseException) -> str:
    """Why something could not be had: the message of those that say it, the kind too of those that may surprise."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (Unavailable, NotImplementedError)) else f"{type(error).__name__}: {text}"
