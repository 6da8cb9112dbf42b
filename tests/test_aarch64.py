"""The portable kernels, cross-compiled for aarch64."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = "aarch64-linux-gnu-g++"
MATRIX_UNITS = "_bf16"  # files for instruction sets of x86-64 only
SOURCES = [path.name for path in sorted((CSRC / "cpu").glob("*.cpp")) if not path.stem.endswith(MATRIX_UNITS)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optional,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is missing"),
]


@pytest.mark.parametrize("source", SOURCES)
def test_compiles(source, tmp_path):
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas"]
    command = [COMPILER, *flags, "-DDK_ISA=portable", f"-I{CSRC}", "-c", CSRC / "cpu" / source, "-o", tmp_path / "o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
