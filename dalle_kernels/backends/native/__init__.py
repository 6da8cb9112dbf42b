"""The compiled backends: `cpu` (libdalle_cpu.so) and `cuda` (libdalle_cuda.so), two implementations of the same
registered operations.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[2]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load(file):
    """Loads a library of operations; returns None or why it cannot be used."""
    path = FOLDER / file
    if not path.is_file():
        return f"{file} was not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:  # torch hides the linker's reason in the cause
        return f"{file} cannot be loaded: {error.__cause__ or error}"
    return None


def _isa_problem():
    """Why the instruction set that DALLE_KERNELS_CPU_ISA names cannot be had, or None."""
    asked = os.environ.get("DALLE_KERNELS_CPU_ISA")
    if not asked:
        return None
    try:
        from ... import _host
    except ImportError as error:
        return f"the module _host cannot be loaded: {error}"
    isas = _host.cpu_isas()
    if asked not in isas:
        return f"DALLE_KERNELS_CPU_ISA={asked!r} is not one of the compiled {', '.join(isas)}"
    return None if isas[asked] else f"DALLE_KERNELS_CPU_ISA={asked!r}: this processor does not have it"


class NativeBackend:
    """Operations registered in C++ for one device type."""

    def __init__(self, name, file, *requirements):
        self.name = name
        problems = [problem for problem in (*requirements, _load(file)) if problem]
        self.problem = "; ".join(problems) or None
        if self.problem is None:
            self.problem = self._register(file)

    def _register(self, file):
        """Takes the operations over; returns None or why the library has not all of them."""
        try:
            from .decode_attention import decode_attention
            from .gumbel_softmax import gumbel_softmax
            from .sample_tokens import sample_tokens
            from .sparse_attention import sparse_attention
        except (
            AttributeError,
            RuntimeError,
        ) as error:  # what torch raises for an operation or a schema it does not know
            return f"{file} was built from other sources, build it again (pip install): {error}"
        self.decode_attention = decode_attention
        self.gumbel_softmax = gumbel_softmax
        self.sample_tokens = sample_tokens
        self.sparse_attention = sparse_attention
        return None

    def reasons(self, operation, tensor):
        """Why this backend cannot run `operation` on `tensor`; empty when it can."""
        if self.problem is not None:
            return (self.problem,)
        if tensor.device.type != self.name:
            return (f"it takes {self.name} tensors, not {tensor.device.type}",)
        if self.name == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return ("it takes GPUs of compute capability 8.0 or newer (A100, RTX 30 and later)",)
        if tensor.dtype not in _DTYPES:
            return (f"it takes float32, bfloat16 and float16, not {tensor.dtype}",)
        if operation.endswith("attention") and tensor.shape[-1] > 128:
            return (f"it takes head dims up to 128, not {tensor.shape[-1]}",)
        return ()


cpu = NativeBackend("cpu", "libdalle_cpu.so", _isa_problem())
cuda = NativeBackend("cuda", "libdalle_cuda.so", cpu.problem)
