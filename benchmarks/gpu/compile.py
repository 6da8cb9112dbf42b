"""Stage compile: whatever checks and benchmarks start is run once by Triton's backend, by many processes at a time. The
kernels that they compile, more than 300, stay in Triton's cache, and later stages need not wait for its compiler.

python -m gpu.compile DEVICE PART PARTS [tiny]
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from functools import partial

from common.setting import ROOT, Setting, python

from . import attention, checks, decode, gumbel, sampling, small

PARTS, SECONDS = min(16, os.cpu_count() or 1), 35.0
LARGE = "beyond 32 bits"  # checks that want the device's memory for themselves


def items(setting):
    return [("kernels", lambda: compile_kernels(setting))]


def compile_kernels(setting, parts=PARTS, seconds=SECONDS):
    """What is not done after so many seconds will be compiled where it is used."""
    end, tiny = time.monotonic() + seconds, ["tiny"] if setting.tiny else []
    commands = [python("-m", "gpu.compile", setting.device, str(part), str(parts), *tiny) for part in range(parts)]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        process.kill()
    return [{"processes": parts, "that finished": sum(process.wait() == 0 for process in processes)}]


def everything(setting):
    """Functions that start all kernels."""
    functions = [check for name, check in checks.items(setting) if LARGE not in name]
    functions += [partial(small.run, setting.device, backend) for backend in setting.backends()]
    for module in (attention, gumbel, decode, sampling):
        groups = module.items(setting, None, 1.0)
        functions += [function for group in ("main", "sweep") for _, function in groups.get(group, [])]
    random.Random(0).shuffle(functions)  # so that every process gets long and short ones
    return functions


def run(setting, part, parts):
    for function in everything(setting)[part::parts]:
        with contextlib.suppress(Exception):  # later stages will tell of it
            function()


if __name__ == "__main__":
    device, part, parts, *tiny = sys.argv[1:]
    run(Setting(device, tiny=bool(tiny), ours=("triton",)), int(part), int(parts))
