"""Devices, their free memory, and the progress of long computations."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dalle.errors import UserError
from dalle_kernels import backends
from dalle_kernels.arguments import usable_device


@dataclass(frozen=True)
class Progress:
    """Progress of a long computation, as passed to `on_step`."""

    step: int
    """Training steps done, or images processed."""
    fraction: float
    """Fraction of the work done, 0 to 1."""
    metrics: dict[str, float]
    """Training losses in nats, averaged since the last call."""
    images_per_second: float
    """Throughput since the last call."""
    seconds_left: float
    """Estimated time left."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Metrics on held-out images; empty unless an evaluation was just made."""


OnStep = Callable[[Progress], None]


def choose_device(name: str) -> torch.device:
    """The PyTorch device of that name; raises a UserError if it cannot be used, or not by the backend that
    DALLE_KERNELS_BACKEND forces.
    """
    try:
        device = usable_device(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    if device.type == "meta":
        raise UserError("device 'meta' cannot be used: it holds shapes but no numbers")
    try:
        for operation in backends.OPERATIONS if backends.forced() else ():
            backends.select(operation, torch.empty(1, 1, device=device))
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{error}: unset DALLE_KERNELS_BACKEND, or choose another backend") from error
    return device


def free_memory(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by PyTorch
        return torch.cuda.mem_get_info(device)[0] + idle
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: assume a quarter of the physical memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
