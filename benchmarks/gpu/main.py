"""Builds, checks and benchmarks everything on a GPU.

python benchmarks/run_gpu.py [--out DIR] [--long] [--stages build,compile,test,...]
"""

from __future__ import annotations

import argparse
import functools
import glob
import os
import sys
import time
from pathlib import Path

from common.setting import ROOT, Setting, python

from .report import Results, failures, plot
from .stages import LONG_FACTOR, ON_DEMAND, STAGES, TOTAL, Budget, run_stage, serve


def main(arguments: list[str] | None = None) -> int:
    names = [stage.name for stage in STAGES[1:]]
    parser = argparse.ArgumentParser(prog="python benchmarks/run_gpu.py", description=__doc__.splitlines()[0])
    out = os.environ.get("OUT") or "runs/gpu"
    parser.add_argument("--out", type=Path, default=out, help="folder of the results (default: $OUT, else runs/gpu)")
    parser.add_argument("--long", action="store_true", help="more sizes and dtypes, up to 70 minutes")
    default = ",".join(name for name in names if name not in ON_DEMAND)
    parser.add_argument("--stages", default=default, help=f"stages to run, of {', '.join(names)} (default: {default})")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # internal: runs the stage of this module
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    setting = Setting(args.device, args.long, args.tiny)
    if args.serve:
        serve(args.serve, setting, args.skip)
        return 0
    wanted = args.stages.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"there is no stage {unknown[0]!r}; the stages are {', '.join(names)}")
    if problem := no_gpu(setting):
        print(problem, file=sys.stderr)
        return 2
    return run(args.out, setting, wanted)


def no_gpu(setting: Setting) -> str | None:
    """Why there is no GPU to run on, or None."""
    if not setting.on_gpu:
        return None
    try:
        import torch
    except ImportError:
        return f"make gpu needs PyTorch, and {sys.executable} has none; name another Python: make gpu PYTHON=..."
    if not torch.cuda.is_available():
        return f"make gpu needs an NVIDIA GPU, and torch {torch.__version__} of {sys.executable} sees none"
    return None


def run(folder: Path, setting: Setting, wanted: list[str]) -> int:
    """Runs the `wanted` stages; returns 1 if anything failed, else 0."""
    folder.mkdir(parents=True, exist_ok=True)
    factor = LONG_FACTOR if setting.long else 1.0
    results, budget, began = Results(folder), Budget(TOTAL * factor), time.monotonic()
    for log in {stage.log for stage in STAGES}:
        (folder / log).write_text("")
    for stage in STAGES:
        if stage.name != "machine" and stage.name not in wanted:
            continue
        stage = stage.scaled(factor)
        seconds = budget.limit(stage.seconds)
        print(f"[{time.monotonic() - began:4.0f} s] {stage.name}, at most {seconds:.0f} s", flush=True)
        record = results.begin(stage.name)
        if seconds < 1:
            record(stage.name, error="not reached: out of time")
            continue
        start = functools.partial(command, stage.name, setting)
        run_stage(stage, seconds, start, folder / stage.log, record, environment())
    try:
        plot(results.data, folder)
    except ImportError:
        print("no plots: matplotlib is not installed")
    print((folder / "gpu.md").read_text())
    return 1 if failures(results.data) else 0


def command(name: str, setting: Setting, skip: int) -> list[str]:
    module = {"test": "checks"}.get(name, name)
    flags = [flag for flag, wanted in (("--long", setting.long), ("--tiny", setting.tiny)) if wanted]
    program = str(ROOT / "benchmarks/run_gpu.py")
    return python(program, "--serve", module, "--skip", str(skip), "--device", setting.device, *flags)


def environment() -> dict[str, str]:
    """The environment of stages: this checkout first in Python's path, and the CUDA toolkit's tools on PATH."""
    folders = [str(folder) for folder in (ROOT, ROOT / "tests", ROOT / "benchmarks")]
    tools = sorted(glob.glob("/usr/local/cuda*/bin"))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), *tools]),
        "PYTHONUNBUFFERED": "1",
    }
