"""The output of nvcc for the CUDA kernels, without a GPU: no warnings, spills or local memory, few enough registers for
the intended occupancy, and tensor cores and asynchronous copies where intended.
"""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from builds_for_tests import once

CSRC = Path(__file__).parents[1] / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ["80", "90a", "100"]
REGISTERS = 65536  # per multiprocessor, on all of these architectures

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
    pytest.mark.parametrize(
        "architecture", [pytest.param(each, marks=[pytest.mark.full] * (each != "90a")) for each in ARCHITECTURES]
    ),
    pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.stem),
]


@dataclass
class Compiled:
    cubin: Path
    ptx: str
    log: str  # of ptxas -v


@pytest.fixture
def compiled(tmp_path_factory):
    """compile(source, architecture), cached."""

    def compile(source, architecture):
        def build(folder):
            command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", f"-I{CSRC}", f"-arch=sm_{architecture}", "-cubin"]
            command += ["-Xptxas=-v,-warn-spills,-warn-lmem-usage", "--keep", "--keep-dir", folder]
            command += [source, "-o", folder / f"{source.stem}.cubin"]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            (folder / "log").write_text(result.stderr)

        folder = once(tmp_path_factory, f"{source.stem}-{architecture}", build)
        ptx, log = ((folder / name).read_text() for name in (f"{source.stem}.ptx", "log"))
        return Compiled(folder / f"{source.stem}.cubin", ptx, log)

    return compile


def resources(log):
    """{kernel: (registers, bytes of stack and spills)} from the output of ptxas -v."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    return {name: (int(registers), sum(map(int, local))) for name, *local, registers in pattern.findall(log)}


def occupancy(ptx):
    """{kernel: (threads, blocks)} of its launch bounds."""
    pattern = re.compile(
        r"\.entry (\w+)\((?:(?!\.entry).)*?\.maxntid (\d+)(?:(?!\.entry).)*?\.minnctapersm (\d+)", re.DOTALL
    )
    return {name: (int(threads), int(blocks)) for name, threads, blocks in pattern.findall(ptx)}


def test_no_warning_and_nothing_in_local_memory(compiled, source, architecture):
    result = compiled(source, architecture)
    assert "warning" not in result.log, [line for line in result.log.splitlines() if "warning" in line]
    kernels = resources(result.log)
    assert kernels and all(local == 0 for _, local in kernels.values())


def test_registers_allow_the_intended_occupancy(compiled, source, architecture):
    result = compiled(source, architecture)
    registers, bounds = resources(result.log), occupancy(result.ptx)
    assert registers.keys() == bounds.keys() and registers
    for kernel, (threads, blocks) in bounds.items():
        taken = -(-registers[kernel][0] // 8) * 8  # registers are allocated in multiples of eight
        assert taken * threads * blocks <= REGISTERS, (kernel, registers[kernel][0], threads, blocks)


def disassembler():
    """The path of nvdisasm, from a CUDA toolkit or the package nvidia-cuda-nvdisasm; None if there is none."""
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("nvidia")
    folders = map(Path, spec.submodule_search_locations) if spec else []
    return found or next((tool for folder in folders for tool in folder.glob("*/bin/nvdisasm")), None)


# Required instructions by file: tensor cores; for tiles in shared memory also ldmatrix and cp.async.
MEANT = {
    "sparse_attention": {"HMMA", "LDSM", "LDGSTS"},
    "sparse_attention_backward": {"HMMA", "LDSM", "LDGSTS"},
    "decode_attention": {"HMMA"},
}


@pytest.mark.skipif(disassembler() is None, reason="there is no nvdisasm")
def test_instructions(compiled, source, architecture):
    command = [disassembler(), "-c", compiled(source, architecture).cubin]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {
        word.split(".")[0]
        for word in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    }
    assert "EXIT" in used
    assert not used & {"LDL", "STL"}, "local memory is used"
    assert MEANT.get(source.stem, set()) <= used, sorted(used)
