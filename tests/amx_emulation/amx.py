"""AMX machine code on this processor, by its own tiles or by those of emulation.cpp."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "amx_emulation"
EMULATION_FLAGS = ["-O2", "-mavx512f", "-ffp-contract=fast", "-shared", "-fPIC", "-ftls-model=initial-exec"]


def native() -> bool:
    """The processor has tiles."""
    return {"amx_tile", "amx_bf16"} <= set(Path("/proc/cpuinfo").read_text().split())


def problem() -> str | None:
    """Why AMX code can neither run nor be emulated here, or None."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "AMX code runs on x86-64 Linux alone"
    if not native() and "avx512f" not in Path("/proc/cpuinfo").read_text().split():
        return "the emulation of AMX needs AVX-512"
    return None


def compile(source: str, *flags: str) -> Path:
    """What g++ makes of a file here; kept in build/ while the file and the flags are the same."""
    text = (HERE / source).read_bytes()
    target = BUILD / f"{Path(source).stem}-{hashlib.sha256(text + repr(flags).encode()).hexdigest()[:16]}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++17", "-Wall", "-Wextra", str(HERE / source), "-o", str(part), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        part.replace(target)
    return target


@functools.cache
def environment() -> dict[str, str]:
    """What a process that runs AMX code needs."""
    return {} if native() else {"LD_PRELOAD": str(compile("emulation.cpp", *EMULATION_FLAGS))}
