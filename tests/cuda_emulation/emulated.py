"""The CUDA kernels and their launchers, compiled for the CPU under emulation (cuda_emulation.h) as
torch.ops.dalle_kernels_emulated.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dalle_kernels.backends.native.tiles import TILES
from dalle_kernels.backends.plans import plan_tensors

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SANITIZE = "DALLE_EMULATION_SANITIZE"  # if set: build with ASan and UBSan, whose libraries must be preloaded


class EmulationError(AssertionError):
    """The emulation's reports, one per line."""


def compile_library(csrc: Path, destination: Path, *, only: tuple[str, ...] = ()) -> Path:
    """Compiles `csrc` (or the operations `only` of it) into a shared library in `destination`; what is already there
    from equal sources is kept. Returns the library.
    """
    kernels = [p for p in sorted((csrc / "cuda").glob("*.cu")) if not only or p.stem in only]
    launchers = [p for p in sorted((csrc / "ops" / "cuda").glob("*.cpp")) if not only or p.stem in only]
    sources = [*kernels, *launchers, csrc / "ops" / "schemas.cpp", HERE / "emulation.cpp"]
    flags = _flags(csrc)
    destination.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        digest = hashlib.sha256(repr((flags, torch.__version__)).encode())
        for file in _with_headers(source, (csrc, HERE)):
            digest.update(file.read_bytes())
        target = destination / f"{source.parent.name}-{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}")
            _run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(part)])
            part.replace(target)
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, sources))
    name = hashlib.sha256(repr([o.name for o in objects]).encode()).hexdigest()[:16]
    library = destination / f"libdalle_emulated-{name}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        _run(["g++", "-shared", *_sanitizers(), *map(str, objects), str(torch_library), "-Wl,-z,defs", "-o", str(part)])
        part.replace(library)
    return library


def _with_headers(source, folders):
    """`source` and the headers in `folders` that it includes, directly or not."""
    found = [source]
    for file in found:
        for name in re.findall(r'^ *# *include "(.+)"', file.read_text(), re.MULTILINE):
            header = next((path for path in (folder / name for folder in folders) if path.exists()), None)
            if header and header not in found:
                found.append(header)
    return found


def _sanitizers():
    return ["-fsanitize=address,undefined"] if os.environ.get(SANITIZE) else []


def _flags(csrc):
    include = Path(torch.__file__).parent / "include"
    return [
        "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
        "-Wno-psabi", "-Wno-unknown-pragmas", "-DDK_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
        f"-I{csrc}", f"-I{HERE}", "-isystem", str(include), *_sanitizers(),
    ]  # fmt: skip


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated library of this checkout, compiled and loaded once; its objects are kept in build/."""
    folder = "cuda_emulation_sanitized" if os.environ.get(SANITIZE) else "cuda_emulation"
    path = compile_library(ROOT / "csrc", ROOT / "build" / folder)
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


def run(operation: str, *arguments, seed: int | None = None, capability: int = 90, library=None):
    """The results of an operation on CPU tensors, computed by the emulated CUDA launcher and kernels.

    `seed` shuffles the order in which blocks, warps and lanes run; `capability` is what the device claims to be.

    Raises:
        EmulationError: a kernel broke a rule, or left a part of a result unwritten.
    """
    emulation = library or globals()["library"]()
    seed = int(torch.randint(2**32, ())) if seed is None else seed
    emulation.dk_emulation_begin(ctypes.c_uint64(seed), capability)
    for tensor in arguments:
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            storage = tensor.untyped_storage()
            emulation.dk_emulation_allow(ctypes.c_void_p(storage.data_ptr()), ctypes.c_uint64(storage.nbytes()))
    results = getattr(torch.ops.dalle_kernels_emulated, operation)(*arguments)
    problems = _errors(emulation)
    for i, result in enumerate(results if isinstance(results, (tuple, list)) else [results]):
        missing = _unwritten(result)
        if missing:
            problems += f"result {i}: {missing} of {result.numel()} elements were not written\n"
    if problems:
        raise EmulationError(f"{operation}, emulation seed {seed}:\n{problems}")
    return results


def counts() -> dict[str, int]:
    """Of the last run: launches, mma instructions, ldmatrix matrices and the passes over shared memory they took."""
    values = (ctypes.c_long * 4)()
    library().dk_emulation_counts(values)
    return dict(zip(("launches", "mma", "ldmatrix", "ldmatrix_passes"), values))


def plans(pattern, n: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """The `cuda` backend's plan and backward plan, on the CPU, and their sizes."""
    return plan_tensors(pattern, n, torch.device("cpu"), TILES["cuda"])


def _errors(emulation):
    text = ctypes.create_string_buffer(1 << 16)
    emulation.dk_emulation_errors(text, ctypes.c_uint64(len(text)))
    return text.value.decode()


def _unwritten(tensor):
    """The number of elements that still hold the 0xff bytes with which every output is filled."""
    if tensor.numel() == 0:
        return 0
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int((tensor.detach().contiguous().view(integer) == -1).sum())


if __name__ == "__main__":
    print(library())
    sys.exit(0)
