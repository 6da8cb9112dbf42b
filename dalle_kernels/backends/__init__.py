"""The choice of a backend.

Each backend is a module or object with a `name`, `reasons(operation, tensor)` (why it cannot take this problem; empty
when it can) and one function per operation. The first without reasons, in the order of `BACKENDS`, is taken;
`backend="name"`, `use_backend` and DALLE_KERNELS_BACKEND force one, and its reasons then become the error.
"""

from __future__ import annotations

import contextlib
import os

from . import reference
from .native import cpu, cuda
from .triton import triton

BACKENDS = {backend.name: backend for backend in (cuda, triton, cpu, reference)}
OPERATIONS = ("sparse_attention", "gumbel_softmax", "sample_tokens", "decode_attention")

_forced = os.environ.get("DALLE_KERNELS_BACKEND") or None


def forced():
    """The backend that DALLE_KERNELS_BACKEND or `use_backend` forces, or None."""
    return _forced


def check_name(name):
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not one of {', '.join(map(repr, BACKENDS))}")


def choose(operation, tensor, backend=None):
    """The backend for `operation` on tensors of `tensor`'s device, dtype and last dimension."""
    name = backend or _forced
    if name is None:
        for candidate in BACKENDS.values():
            if not candidate.reasons(operation, tensor):
                return candidate
    check_name(name)
    reasons = BACKENDS[name].reasons(operation, tensor)
    if reasons:
        raise NotImplementedError(f"backend {name!r} cannot run {operation} here: {'; '.join(reasons)}")
    return BACKENDS[name]


@contextlib.contextmanager
def use_backend(name):
    """Within the `with` block, every operation runs on backend `name` (None: the usual choice)."""
    global _forced
    if name is not None:
        check_name(name)
    saved, _forced = _forced, name
    try:
        yield
    finally:
        _forced = saved
