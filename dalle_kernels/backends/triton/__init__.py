"""The backend `triton`: kernels in Python, compiled on first use by Triton, for GPUs where nvcc did not compile ours.

How it is built:

- An operation is one file with the operation's name. It holds the kernels, the operation that launches them, registered
  as `dalle_kernels_triton::<operation>` by `registration.register`, its fake kernel and its gradient, and a function of
  the operation's name with the arguments of `reference`. What several operations need stands in `math.py`,
  `matrices.py` and `philox.py`; `plan.py` reads plans.
- How a kernel is cut and launched (rows and columns of a tile, warps, stages) is looked up in `launch.py`. Nothing is
  tuned at run time; `python -m dalle_kernels.tune OPERATION` prints better lines for that
  table.
- Nothing here imports Triton, until somebody asks for a tensor that this backend could take, or for `problem`.
- TRITON_INTERPRET=1, set before this package is imported, makes it take CPU tensors: slow, but every line runs, in the
  tests too. (bfloat16 is declined there, which Triton's interpreter computes wrongly.)

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
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(Backend):
    """Loads its operations, and with them Triton, when first asked about a tensor that it could take."""

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
    """Imports Triton and the operations; returns why it cannot, or None."""
    try:
        import triton as compiler
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if tuple(map(int, compiler.__version__.split(".")[:2])) < OLDEST:
        return f"it takes Triton {'.'.join(map(str, OLDEST))} or newer, not {compiler.__version__}"
    triton.load()
    return None


@constant_result
def _problem() -> str | None:
    return _load()


@constant_result
def _gpu_problem(device: torch.device) -> str | None:
    """Why a GPU cannot run Triton's kernels, or None."""
    if not torch.cuda.is_available():
        return None
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "it takes GPUs of compute capability 8.0 or newer (A100, RTX 30 and later)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton compiles its launchers with a C compiler, and finds neither gcc nor clang, nor one that CC names"
    return None
