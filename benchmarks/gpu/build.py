"""Stage build: the libraries, in place; what then loads; and that the GPU's primitives do what the kernels assume."""

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
    """What `python -m dalle_kernels.info` says of the libraries and of each operation's backend."""
    command = python("-m", "dalle_kernels.info", "--json")
    info = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    return [{name: info[name] for name in ("libraries", "operations", "build")}]


def primitives():
    """The bitwise conformance test of the device primitives: what emulation on a CPU cannot prove."""
    logged(python("tests/cuda_emulation/primitives.py"))
