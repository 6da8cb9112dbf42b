"""Build information and instruction sets, read from libdalle_cpu.so. Every function raises OSError if the library
cannot be loaded.
"""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path

import torch  # noqa: F401  the library links libtorch_cpu.so, which must be loaded before it

FOLDER = Path(__file__).parent


@functools.cache
def _call(function: str) -> str:
    library = ctypes.CDLL(str(FOLDER / "libdalle_cpu.so"))
    try:
        call = library[function]
    except AttributeError as error:
        raise OSError(f"libdalle_cpu.so was built from other sources; rebuild it (pip install): {error}") from None
    call.restype = ctypes.c_char_p
    return call().decode()


def build_info() -> dict:
    """Version, compilers, compiled instruction sets, and compiled GPU architectures or why there are none."""
    info = json.loads(_call("dalle_kernels_build_info"))
    cuda = info["cuda"]
    if "architectures" in cuda:
        cuda["architectures"] = cuda["architectures"].split(",")
    return {**info, "cpu_isas": list(info["cpu_isas"])}


def cpu_isas() -> dict[str, bool]:
    """{compiled instruction set: whether this processor supports it}, in ascending order."""
    return json.loads(_call("dalle_kernels_build_info"))["cpu_isas"]


def active_isa() -> str:
    """The instruction set that the CPU kernels run on."""
    return _call("dalle_kernels_active_isa")


def isa_reason() -> str:
    """Why they run on it."""
    return _call("dalle_kernels_isa_reason")
