"""Schedules of learning rate, temperature and KL weight."""

import math


def cosine(start: float, end: float, fraction: float) -> float:
    """Cosine annealing from `start` at fraction 0 to `end` at fraction 1, constant outside (App. A.2)."""
    progress = min(max(fraction, 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup(step: int, steps: int) -> float:
    """Linear warm-up: a factor from 1 / steps at step 0 to 1."""
    return min(1.0, (step + 1) / max(steps, 1))
