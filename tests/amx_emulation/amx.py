"""AMX machine code on this processor: "native", on its own tiles, or "emulated", by emulation.cpp.

What is to be emulated is a copy of an executable or a library in which the tile instructions are hidden: the first byte
of each is replaced by one with which no instruction begins, so that every processor traps at it, with AMX or without.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import dalle_kernels
from dalle_kernels.build_info import cpu_isas

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "amx_emulation"
VEX, HIDDEN = 0xC4, 0x06  # 0x06 is `push es` of 32-bit code; 64-bit code has no such instruction
ISAS = cpu_isas()  # {compiled instruction set: whether this processor supports it}


def problem(mode: str, kernels: bool = False) -> str | None:
    """Why AMX code (with `kernels`, that of the kernels) cannot run here in a mode, or None."""
    if "amx" not in ISAS:
        return "there are no AMX kernels: they need x86-64 and a compiler that knows AMX"
    if mode == "native" and not ISAS["amx"]:
        return "this processor has no AMX, or Linux does not permit its use"
    if mode == "emulated" and not ISAS["avx2"]:
        return "the emulation of AMX needs AVX2 and FMA"
    if kernels and not ISAS["avx512_bf16"]:
        return "the kernels need AVX512-BF16 too"
    return None


def compile(source: str, *flags: str, csrc: Path = CSRC) -> Path:
    """The output of g++ for a file here, cached in build/ until the file, the kernels' headers or the flags change."""
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


def emulation(first_byte: int = HIDDEN) -> Path:
    """The library that executes tile instructions with this first byte."""
    flags = "-O2", "-mavx2", "-mfma", "-shared", "-fPIC", "-ftls-model=initial-exec"
    return compile("emulation.cpp", f"-DFIRST_BYTE={first_byte}", *flags)


def offset_in_file(elf: bytes, address: int) -> int:
    """The offset in an ELF file of the byte that is loaded at an address, from the program headers."""
    (headers,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    for header in range(headers, headers + size * count, size):
        kind, _, offset, start, _, length = struct.unpack_from("<IIQQQQ", elf, header)
        if kind == 1 and start <= address < start + length:  # PT_LOAD
            return offset + address - start
    raise ValueError(f"address {address:#x} is not loaded from the file")


def hide(binary: Path, copy: Path) -> Path:
    """Writes a copy of an executable or library in which every tile instruction is hidden."""
    listing = subprocess.run(
        ["objdump", "-d", "-w", "--no-show-raw-insn", binary], capture_output=True, text=True, check=True
    ).stdout
    addresses = re.findall(r"^ *([0-9a-f]+):\t(?:ldtilecfg|sttilecfg|tile|tdp)", listing, re.MULTILINE)
    if not addresses:
        raise ValueError(f"{binary} has no tile instructions")
    elf = bytearray(binary.read_bytes())
    for offset in [offset_in_file(elf, int(address, 16)) for address in addresses]:
        if elf[offset] != VEX:
            raise ValueError(f"{binary}: byte {offset:#x} is {elf[offset]:#x}, not the first one of a tile instruction")
        elf[offset] = HIDDEN
    part = copy.with_name(f"{copy.name}.{os.getpid()}")
    part.write_bytes(elf)
    part.chmod(0o755)
    return part.replace(copy)


def prepared(binary: Path, mode: str) -> Path:
    """The binary itself, or a copy next to it for emulation."""
    return binary if mode == "native" else hide(binary, binary.with_name(f"{binary.name}-hidden"))


def package(folder: Path, mode: str) -> Path:
    """Puts the Python package into a folder, with its library `prepared` for a mode; returns the folder."""
    source, without = Path(dalle_kernels.__file__).parent, shutil.ignore_patterns("libdalle_*.so", "__pycache__")
    shutil.copytree(source, folder / "dalle_kernels", copy_function=os.symlink, ignore=without)
    library = folder / "dalle_kernels" / "libdalle_cpu.so"
    if mode == "native":
        library.symlink_to(source / library.name)
    else:
        hide(source / library.name, library)
    return folder


def environment(mode: str) -> dict[str, str]:
    """The environment of a process that runs AMX code. PyTorch's own libraries, where nothing is hidden, must not use
    tiles.
    """
    if mode == "native":
        return {}
    return {
        "LD_PRELOAD": str(emulation()),
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    }


def run(mode: str, *command, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command whose binaries are `prepared` for a mode, with more environment variables."""
    env = {**os.environ, **environment(mode), **variables}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
