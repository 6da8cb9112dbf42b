"""The choice of a backend.

The first in the order of BACKENDS that has no reasons against a problem is taken; `backend="name"`, `use_backend` and
DALLE_KERNELS_BACKEND force one, and its reasons then become the error.
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
    """The backend that a thread forces. (Not a ContextVar, which torch.compile can neither trace nor guard.)"""

    def __init__(self) -> None:  # in every thread
        self.name = os.environ.get("DALLE_KERNELS_BACKEND") or None


_forced = _Forced()


def forced() -> str | None:
    """The backend that DALLE_KERNELS_BACKEND or `use_backend` forces in this thread, or None."""
    return _forced.name


def check_name(name: str) -> None:
    """ValueError if there is no backend of this name."""
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not one of {', '.join(map(repr, BACKENDS))}")


def select(operation: str, tensor: torch.Tensor, backend: str | None = None) -> Backend:
    """The backend for `operation` on tensors of `tensor`'s device, dtype and last dimension.

    Raises:
        ValueError: no backend has the name that is asked for.
        NotImplementedError: it cannot run the problem.
    """
    name = backend or _forced.name
    if name is None:
        return next(candidate for candidate in BACKENDS.values() if not candidate.reasons(operation, tensor))
    check_name(name)
    reasons = BACKENDS[name].reasons(operation, tensor)
    if reasons:
        raise NotImplementedError(f"backend {name!r} cannot run {operation} here: {'; '.join(reasons)}")
    return BACKENDS[name]


def dispatch(operation: str, tensor: torch.Tensor, backend: str | None = None) -> Callable:
    """The function of the selected backend; see `select`."""
    return select(operation, tensor, backend).operations[operation]


@contextlib.contextmanager
def use_backend(name: str | None) -> Generator[None, None, None]:
    """Within the `with` block, every operation that this thread calls runs on backend `name` (None: the usual choice).

    Other threads are not affected, those that the block starts included.

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
