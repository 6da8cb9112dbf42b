"""The compiled backends: `cpu` (libdalle_cpu.so) and `cuda` (libdalle_cuda.so), two implementations of the same
registered operations.
"""

from __future__ import annotations

import os

import torch

from ...build_info import FOLDER, cpu_isas
from ...compile import constant_result
from ..base import Backend
from ..plans import Tiles
from .tiles import tiles

_WIDE_FLOAT32_BYTES = 132_608  # shared memory of a block; asserted in csrc/cuda/sparse_attention_backward.cu


class NativeBackend(Backend):
    """Operations registered in C++ for one device type.

    Args:
        name: the device type.
        file: the library, in the folder of the package.
        requirement: why a library that this one needs cannot be used, or None.
    """

    def __init__(self, name: str, file: str, requirement: str | None = None) -> None:
        super().__init__()
        self.name, self.devices = name, (name,)
        self.problem = self.load_problem = requirement or self._load_library(file)

    def _load_library(self, file: str) -> str | None:
        """Loads the library and binds its operations; returns the error message if that fails, else None."""
        path = FOLDER / file
        if not path.is_file():
            return f"{file} was not built"
        try:
            torch.ops.load_library(path)
        except OSError as error:  # torch hides the linker's reason in the cause
            return f"{file} cannot be loaded: {error.__cause__ or error}"
        try:
            self.load()
        except (AttributeError, RuntimeError) as error:  # an operation or a schema that torch does not know
            return f"{file} was built from other sources; rebuild it (pip install): {error}"
        return None

    def tiles(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> Tiles:
        return tiles(device, head_dim, dtype)


class CpuBackend(NativeBackend):
    """The CPU kernels. DALLE_KERNELS_CPU_ISA selects an instruction set."""

    options = True

    def __init__(self) -> None:
        super().__init__("cpu", "libdalle_cpu.so")
        self.problem = self.load_problem or _isa_problem()


class CudaBackend(NativeBackend):
    """The CUDA kernels. libdalle_cpu.so defines the schemas of their operations, so it must be loaded first."""

    def __init__(self, requirement: str | None = None, file: str = "libdalle_cuda.so") -> None:
        super().__init__("cuda", file, requirement)

    def device_problem(self, operation: str, tensor: torch.Tensor) -> str | None:
        gpu = _gpu(str(tensor.device))
        if gpu is None:
            return None
        capability, shared_memory = gpu
        if capability < (8, 0):
            return "it needs a GPU of compute capability 8.0 or newer (A100, RTX 30 and later)"
        wide = operation == "sparse_attention" and tensor.dtype == torch.float32 and tensor.shape[-1] > 64
        if wide and shared_memory < _WIDE_FLOAT32_BYTES:
            return (
                f"in float32 it supports head dims up to 64 on this GPU, not {tensor.shape[-1]}: "
                f"a block may have {shared_memory} bytes of shared memory, and {_WIDE_FLOAT32_BYTES} are needed"
            )
        return None


def _isa_problem() -> str | None:
    """Why the instruction set that DALLE_KERNELS_CPU_ISA names cannot be used, or None."""
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
def _gpu(device: str) -> tuple[tuple[int, int], int] | None:
    """Compute capability and maximum shared memory per block in bytes; None if no GPU is visible (fake tensors)."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    # pyrefly: ignore[missing-attribute]  # of torch's stubs
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin


cpu = CpuBackend()
cuda = CudaBackend(cpu.load_problem)
