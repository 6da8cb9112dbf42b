"""Backend selection.

The first entry of BACKENDS that can run a problem is selected. `backend="name"`, `use_backend` and
DALLE_KERNELS_BACKEND force one; if it cannot run the problem, its reasons become the error.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator

import torch

from .base import OPERATIONS, Backend
from .native import cpu, cuda
from .reference import reference
from .triton import triton

__all__ = ["BACKENDS", "OPERATIONS", "check_name", "dispatch", "forced", "select", "use_backend"]

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (cuda, triton, cpu, reference)}


class _Forced(threading.local):
    """The backend that a thread forces. Not a ContextVar, which torch.compile can neither trace nor guard."""

    def __init__(self) -> None:  # runs once per thread
        self.name = os.environ.get("DALLE_KERNELS_BACKEND") or None


_forced = _Forced()


def forced() -> str | None:
    """The backend that DALLE_KERNELS_BACKEND or `use_backend` forces in this thread, or None."""
    return _forced.name


def check_name(name: str) -> None:
    """Raises ValueError if no backend has this name."""
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not one of {', '.join(map(repr, BACKENDS))}")


def select(
    operation: str, tensor: torch.Tensor, backend: str | None = None, uses: tuple[str, ...] = ()
) -> Backend:
    """The backend that runs `operation` on tensors with the device, dtype and last dimension of `tensor`. `uses`: the
    options of the call, in words.

    Raises:
        ValueError: no backend has the requested name.
        NotImplementedError: the requested backend cannot run the problem.
    """
    name = backend or _forced.name
    if name is None:
        kind = tensor.device.type  # compared first: composing reasons would take microseconds in every call
        for candidate in BACKENDS.values():
            possible = candidate.devices is None or kind in candidate.devices
            if possible and not candidate.reasons(operation, tensor, uses):
                return candidate
        name = reference.name
    check_name(name)
    reasons = BACKENDS[name].reasons(operation, tensor, uses)
    if reasons:
        raise NotImplementedError(f"backend {name!r} cannot run {operation} here: {'; '.join(reasons)}")
    return BACKENDS[name]


def dispatch(
    operation: str, tensor: torch.Tensor, backend: str | None = None, uses: tuple[str, ...] = ()
) -> Callable:
    """The function of the selected backend; see `select`."""
    return select(operation, tensor, backend, uses).operations[operation]


@contextlib.contextmanager
def use_backend(name: str | None) -> Generator[None, None, None]:
    """Forces the backend `name` for every operation that this thread calls in the `with` block (None: automatic).

    Other threads are not affected, including threads started in the block.

    Raises:
        ValueError: no backend has this name.
    """
    if name is not None:
        check_name(name)
    saved, _forced.name = _forced.name, name
    try:
        yield
    finally:
        _forced.name = saved
