"""The backend `triton`: kernels in Python, compiled on first use by Triton, for GPUs where nvcc did not compile ours.

How it is built:

- An operation is one file with the operation's name. It holds the kernels, the operation that launches them, registered
  as `dalle_kernels_triton::<operation>` by `registration.register`, its fake kernel and its gradient, and a function of
  the operation's name with the arguments of `reference`. What several operations need stands in `math.py`,
  `matrices.py` and `philox.py`; `plan.py` reads plans.
- How a kernel is cut and launched (rows and columns of a tile, warps, stages) is looked up in `launch.py`. Nothing is
  tuned at run time; `python -m dalle_kernels.backends.triton.tune OPERATION` prints better lines for that
  table.
- Nothing here imports Triton, until somebody asks for a tensor that this backend could take, or for `problem`.
- TRITON_INTERPRET=1, set before Triton is imported, makes it take CPU tensors: slow, but every line runs, in the tests
  too. (bfloat16 is declined there, which Triton's interpreter computes wrongly.)

docs/triton.md explains the attention kernel line by line.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil

import torch

from ...compile import constant_result

OLDEST = (3, 6)
OPERATIONS = ("sparse_attention", "gumbel_softmax", "sample_tokens", "decode_attention")  # a file each
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _load():
    """Imports Triton, and the operations into the backend; returns why it cannot, or None."""
    try:
        import triton as compiler
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if tuple(map(int, compiler.__version__.split(".")[:2])) < OLDEST:
        return f"it takes Triton {'.'.join(map(str, OLDEST))} or newer, not {compiler.__version__}"
    for name in OPERATIONS:
        setattr(triton, name, getattr(importlib.import_module(f"{__name__}.{name}"), name))
    return None


@constant_result
def _problem():
    return _load()


@constant_result
def _gpu_problem(device):
    """Why a GPU cannot run Triton's kernels, or None."""
    if not torch.cuda.is_available():
        return None
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "it takes GPUs of compute capability 8.0 or newer (A100, RTX 30 and later)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton compiles its launchers with a C compiler, and finds neither gcc nor clang, nor one that CC names"
    return None


class TritonBackend:
    name = "triton"

    @property
    def problem(self):
        """Why no operation can run, or None; what `info` shows."""
        return _problem()

    def reasons(self, operation, tensor):
        """Why this backend cannot run `operation` on `tensor`; empty when it can."""
        kind = tensor.device.type
        if kind != "cuda" and not (kind == "cpu" and interpreted()):
            return (f"it takes cuda tensors, not {kind} (for tests cpu too, where TRITON_INTERPRET=1)",)
        if tensor.dtype not in _DTYPES:
            return (f"it takes float32, bfloat16 and float16, not {tensor.dtype}",)
        if tensor.dtype == torch.bfloat16 and interpreted():
            return ("Triton's interpreter (TRITON_INTERPRET=1) computes bfloat16 wrongly",)
        if operation.endswith("attention") and tensor.shape[-1] > 128:
            return (f"it takes head dims up to 128, not {tensor.shape[-1]}",)
        problem = _problem() or (_gpu_problem(tensor.device) if kind == "cuda" else None)
        return (problem,) if problem else ()


triton = TritonBackend()
