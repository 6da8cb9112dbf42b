"""The backend `triton`: kernels in Python that Triton compiles on first use, for GPUs that libdalle_cuda.so lacks.

Structure:

- Each operation is one file of its name. It contains the kernels; the operation that launches them, registered as
  `dalle_kernels_triton::<operation>` by `registration.register`; its fake kernel and gradient; and a function of the
  operation's name with the arguments of `reference`. Shared code is in `math.py`, `softmax.py`, `matrices.py` and
  `philox.py`; `plan.py` reads plans.
- The launch parameters of a kernel (rows and columns of a tile, warps, stages) are looked up in `launch.py`. Nothing is
  tuned at run time; `python -m dalle_kernels.tune OPERATION` prints lines for that table.
- Triton is imported only when this backend is queried for a tensor that it supports, or for `problem`.
- With TRITON_INTERPRET=1, set before this package is imported, the backend runs on CPU tensors in Triton's interpreter:
  slow, but every line runs, also in the tests. bfloat16 is declined there, because the interpreter computes it wrongly.

docs/triton.md explains the attention kernel line by line.
"""

from __future__ import annotations

import functools
import os
import shutil

import torch

from ...compile import constant_result
from ..base import Backend
from ..plans import Tiles
from . import launch

OLDEST = (3, 6)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(Backend):
    """Imports Triton and the operations when first queried for a tensor that it supports."""

    name = "triton"
    devices = ("cuda", "cpu") if interpreted() else ("cuda",)
    # Triton's interpreter computes bfloat16 wrongly.
    dtypes = (torch.float32, torch.float16) if interpreted() else Backend.dtypes

    @property
    def problem(self) -> str | None:
        return _problem()

    def device_problem(self, operation: str, tensor: torch.Tensor) -> str | None:
        return _gpu_problem(tensor.device) if tensor.device.type == "cuda" else None

    def tiles(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> Tiles:
        return launch.tiles(device, head_dim, dtype)


triton = TritonBackend()


@functools.cache
def _load() -> str | None:
    """Imports Triton and the operations; returns the error message if that fails, else None."""
    try:
        import triton as compiler
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if tuple(map(int, compiler.__version__.split(".")[:2])) < OLDEST:
        return f"it needs Triton {'.'.join(map(str, OLDEST))} or newer, not {compiler.__version__}"
    triton.load()
    return None


@constant_result
def _problem() -> str | None:
    return _load()


@constant_result
def _gpu_problem(device: torch.device) -> str | None:
    """Why a GPU cannot run Triton kernels, or None."""
    if not torch.cuda.is_available():
        return None
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer (A100, RTX 30 and later)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton compiles its launchers with a C compiler, and finds neither gcc nor clang, nor one that CC names"
    return None
