"""Stage machine: describes the machine and its software."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess

import torch
from common.machine import processor
from common.setting import ROOT

TOOLS = ("nvcc", "cmake", "ninja", "c++", "compute-sanitizer")
PACKAGES = ("torch", "triton", "numpy", "pybind11", "pytest",
            "hypothesis", "pytest-benchmark", "pytest-timeout", "matplotlib")  # fmt: skip


def items(setting):
    return [("machine", lambda: [describe(setting)])]


def describe(setting) -> dict:
    row = {
        "commit": commit(),
        "processor": f"{processor()}, {os.cpu_count()} threads",
        "python": platform.python_version(),
        "packages": {name: package(name) for name in PACKAGES},
        "tools": {name: tool(name) for name in TOOLS},
    }
    return {**row, **gpu()} if setting.on_gpu else row


def gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory, GiB": round(properties.total_memory / 2**30, 1),
        "L2, MB": round(properties.L2_cache_size / 1e6, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": query("driver_version"),
        "maximum clocks, MHz (SM, memory)": query("clocks.max.sm,clocks.max.memory"),
        "CUDA of torch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }


def query(fields: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def commit() -> str | None:
    """The commit of the sources; None outside a repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def tool(name: str) -> str | None:
    """The version line of a tool; None if it is not installed."""
    if shutil.which(name) is None:
        return None
    lines = subprocess.run([name, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line.strip() for line in lines if re.search(r"\d+\.\d+", line)), "present")
