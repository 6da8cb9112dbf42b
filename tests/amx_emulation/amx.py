"""AMX machine code on this processor, by its own tiles or by those of emulation.cpp."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "amx_emulation"
EMULATION_FLAGS = ["-O2", "-mavx512f", "-ffp-contract=fast", "-shared", "-fPIC", "-ftls-model=initial-exec"]


def processor() -> set[str]:
    """What the processor has, by Linux's names."""
    return set(Path("/proc/cpuinfo").read_text().split())


def native() -> bool:
    return {"amx_tile", "amx_bf16"} <= processor()


def problem() -> str | None:
    """Why AMX code can neither run nor be emulated here, or None."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "AMX code runs on x86-64 Linux alone"
    if not native() and "avx512f" not in processor():
        return "the emulation of AMX needs AVX-512"
    return None


def compile(source: str, *flags: str, csrc: Path = CSRC) -> Path:
    """What g++ makes of a file here; kept in build/ while the file, the kernels' headers and the flags are the same."""
    sources = [HERE / source, *sorted((csrc / "cpu").glob("*.h"))]
    digest = hashlib.sha256(repr(flags).encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()
    target = BUILD / f"{Path(source).stem}-{digest[:16]}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++17", "-Wall", "-Wextra", f"-I{csrc}", str(HERE / source), "-o", str(part), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        part.replace(target)
    return target


@functools.cache
def environment() -> dict[str, str]:
    """What a process that runs AMX code needs."""
    return {} if native() else {"LD_PRELOAD": str(compile("emulation.cpp", *EMULATION_FLAGS))}
