"""Statistics of timings, and baselines that may be unavailable."""

from __future__ import annotations

import statistics

import torch


class Unavailable(Exception):
    """Why a baseline cannot run here."""


def quartiles(values) -> list[float]:
    """First quartile, median, third quartile; of a single value, that value three times."""
    values = sorted(values)
    return [values[len(values) // 4], statistics.median(values), values[-1 - len(values) // 4]]


def compiled(function):
    """torch.compile with static shapes, and without the recompile limit, beyond which it silently runs eagerly."""
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(function, dynamic=False)


def reason(error: BaseException) -> str:
    """An error as one line; unexpected errors with their type."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (Unavailable, NotImplementedError)) else f"{type(error).__name__}: {text}"
