"""Stage compile: runs every check and benchmark once on the Triton backend, in many processes. This fills Triton's
cache with more than 300 kernels, so that later stages do not wait for its compiler.

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
LARGE = "beyond 32 bits"  # checks that need most of the device's memory


def items(setting):
    return [("kernels", lambda: compile_kernels(setting))]


def compile_kernels(setting, parts=PARTS, seconds=SECONDS):
    """Compiles for at most `seconds`; the remaining kernels are compiled on first use."""
    end, tiny = time.monotonic() + seconds, ["tiny"] if setting.tiny else []
    commands = [python("-m", "gpu.compile", setting.device, str(part), str(parts), *tiny) for part in range(parts)]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        process.kill()
    return [{"processes": parts, "that finished": sum(process.wait() == 0 for process in processes)}]


def everything(setting):
    """Functions that together launch all kernels."""
    functions = [check for name, check in checks.items(setting) if LARGE not in name]
    functions += [partial(small.run, setting.device, backend) for backend in setting.backends()]
    for module in (attention, gumbel, decode, sampling):
        groups = module.items(setting, None, 1.0)
        functions += [function for group in ("main", "sweep") for _, function in groups.get(group, [])]
    random.Random(0).shuffle(functions)  # distributes long and short ones over the processes
    return functions


def run(setting, part, parts):
    for function in everything(setting)[part::parts]:
        with contextlib.suppress(Exception):  # later stages report it
            function()


if __name__ == "__main__":
    device, part, parts, *tiny = sys.argv[1:]
    run(Setting(device, tiny=bool(tiny), ours=("triton",)), int(part), int(parts))
