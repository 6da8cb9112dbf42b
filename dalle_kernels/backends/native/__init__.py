"""The compiled backends: `cpu` (libdalle_cpu.so) and `cuda` (libdalle_cuda.so), two implementations of the same
registered operations.
"""

from __future__ import annotations

import os

import torch

from ...build_info import FOLDER, cpu_isas
from ...compile import constant_result

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDE_FLOAT32_BYTES = 132_608  # shared memory of a block; asserted in csrc/cuda/sparse_attention_backward.cu


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
        isas = cpu_isas()
    except OSError as error:
        return str(error)
    if asked not in isas:
        return f"DALLE_KERNELS_CPU_ISA={asked!r} is not one of the compiled {', '.join(isas)}"
    return None if isas[asked] else f"DALLE_KERNELS_CPU_ISA={asked!r}: this processor does not have it"


@constant_result
def _gpu(device):
    """Compute capability and bytes of shared memory that a block may have; None where no GPU is visible, as with
    tensors without data.
    """
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin


def _gpu_problem(operation, tensor):
    """Why the GPU that holds `tensor` cannot run `operation`, or None."""
    gpu = _gpu(str(tensor.device))
    if gpu is None:
        return None
    capability, shared_memory = gpu
    if capability < (8, 0):
        return "it takes GPUs of compute capability 8.0 or newer (A100, RTX 30 and later)"
    wide = operation == "sparse_attention" and tensor.dtype == torch.float32 and tensor.shape[-1] > 64
    if wide and shared_memory < _WIDE_FLOAT32_BYTES:
        return (
            f"in float32 it takes head dims up to 64 on this GPU, not {tensor.shape[-1]}: "
            f"a block may have {shared_memory} bytes of shared memory, and {_WIDE_FLOAT32_BYTES} are needed"
        )
    return None


class NativeBackend:
    """Operations registered in C++ for one device type."""

    def __init__(self, name, file, problem):
        self.name = name
        self.problem = problem or self._register(file)

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
        if tensor.dtype not in _DTYPES:
            return (f"it takes float32, bfloat16 and float16, not {tensor.dtype}",)
        if operation.endswith("attention") and tensor.shape[-1] > 128:
            return (f"it takes head dims up to 128, not {tensor.shape[-1]}",)
        problem = _gpu_problem(operation, tensor) if self.name == "cuda" else None
        return (problem,) if problem else ()


_cpu_library = _load("libdalle_cpu.so")  # it has the schemas, so CUDA needs it too, on any instruction set
cpu = NativeBackend("cpu", "libdalle_cpu.so", _cpu_library or _isa_problem())
cuda = NativeBackend("cuda", "libdalle_cuda.so", _cpu_library or _load("libdalle_cuda.so"))
