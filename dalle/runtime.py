"""Devices, their memory, and how far a long computation is."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dalle.errors import UserError


@dataclass(frozen=True)
class Progress:
    """How far a long computation is: what `on_step` receives."""

    step: int
    """Updates done, or pictures."""
    fraction: float
    """Of the whole, 0 to 1."""
    metrics: dict[str, float]
    """Losses in nats, means since the last report."""
    pictures_per_second: float
    """Since the last report."""
    seconds_left: float
    """Estimate."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Numbers on held-out pictures, if an evaluation was just made."""


OnStep = Callable[[Progress], None]


def choose_device(name: str) -> torch.device:
    """The device of that name; a UserError if PyTorch cannot use it."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UserError("device 'meta' cannot be used: it holds shapes but no numbers")
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch holds it for us
        return torch.cuda.mem_get_info(device)[0] + idle
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux: a part of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
