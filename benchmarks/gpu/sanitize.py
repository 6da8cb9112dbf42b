"""Stage sanitize: compute-sanitizer's memcheck and racecheck over every operation on small shapes."""

import itertools
import os
import shutil
from functools import partial

from common.setting import logged, python

TOOLS = ("memcheck", "racecheck")


def items(setting):
    pairs = itertools.product(setting.backends(), TOOLS)
    return [(f"{backend}: {tool}", partial(sanitize, tool, setting.device, backend)) for backend, tool in pairs]


def sanitize(tool, device, backend):
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise FileNotFoundError("compute-sanitizer is neither on PATH nor in /usr/local/cuda*/bin")
    # Without torch's caching allocator every tensor is an allocation, so that out-of-bounds accesses are detected.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ops = python("-m", "gpu.small", device, backend)
    logged([program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "50", *ops], env=environment)
