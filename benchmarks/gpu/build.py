"""Stage build: the libraries, in place; what then loads; and that the GPU's primitives do what the kernels assume."""

import json
import os
import shutil
import subprocess
import time

import torch

from .setting import ROOT, logged, python

CONFORMANCE = ROOT / "tests/cuda_emulation/conformance.cu"


def items(setting):
    return [
        ("libraries", libraries),
        ("backends", backends),
        ("primitives", primitives),
    ]


def libraries():
    began = time.monotonic()
    logged(python("setup.py", "build_ext", "--inplace"), env={**os.environ, "DALLE_CUDA": "1"})
    built = {file.name: file.stat().st_size for file in sorted((ROOT / "dalle_kernels").glob("*.so"))}
    return [{"seconds": time.monotonic() - began, "bytes": built}]


def backends():
    """What `python -m dalle_kernels.info` says of the libraries and of each operation's backend."""
    command = python("-m", "dalle_kernels.info", "--json")
    info = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    return [{name: info[name] for name in ("libraries", "operations", "build")}]


def primitives():
    """The bitwise conformance test of the device primitives: what emulation on a CPU cannot prove."""
    if not CONFORMANCE.is_file():
        raise FileNotFoundError(f"there is no {CONFORMANCE.relative_to(ROOT)}")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on PATH")
    program = ROOT / "build/gpu/conformance"
    program.parent.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    target = f"{major}{minor}{'a' if major >= 9 else ''}"
    flags = ["-std=c++17", "-O2", "-lineinfo", f"-I{ROOT / 'csrc'}", f"-I{CONFORMANCE.parent}"]
    architecture = ["-gencode", f"arch=compute_{target},code=sm_{target}"]
    logged([nvcc, *flags, *architecture, "-o", str(program), str(CONFORMANCE)])
    logged([str(program)])
