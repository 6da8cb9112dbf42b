"""Stage build: builds the libraries in place, reports the backends, and checks the device primitives."""

import json
import os
import subprocess
import time

from common.setting import ROOT, logged, python


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
    """The libraries and the backend of each operation, from `python -m dalle_kernels.info`."""
    command = python("-m", "dalle_kernels.info", "--json")
    info = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    return [{name: info[name] for name in ("libraries", "operations", "build")}]


def primitives():
    """Bitwise test of the device primitives on this GPU, which emulation on a CPU cannot replace."""
    logged(python("tests/cuda_emulation/primitives.py"))
