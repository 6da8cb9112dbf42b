"""The CPU kernels with AddressSanitizer and UBSan: the portable ones and those of the best instruction set here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sanitizers_for_tests import LIBRARIES, REPORTS

import dalle_kernels
from dalle_kernels import build_info

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitized"
BEST = [isa for isa, supported in build_info.cpu_isas().items() if supported][-1]
ON_TOP = {"avx512_bf16": ["avx512"], "amx": ["avx512"]}  # instruction sets whose kernels complete other tables
BUILT = list(dict.fromkeys(["portable", *ON_TOP.get(BEST, []), BEST]))
ISAS = list(dict.fromkeys([BEST, "portable"]))
TESTS = {
    "test_conformance.py": "any_shape or cpu and (hidden or broken or bits or unseen or offset or unaligned)",
    "test_sparse_attention.py": "depend and (conv or causal-bfloat16)",
    "test_attention_options.py": "any_shape or never_read and cpu",
    "test_decode_attention.py": "depend",
    "test_gumbel_softmax.py": "depend",
    "test_sample_tokens.py": "depend",
}

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
TOOLS = [shutil.which(tool, path=PATH) for tool in ("cmake", "ninja")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.full,
    pytest.mark.skipif(None in LIBRARIES, reason="g++ has no libasan.so or libubsan.so"),
    pytest.mark.skipif(None in TOOLS, reason="cmake or ninja is missing"),
]


@pytest.fixture
def package(tmp_path):
    """A folder with the Python package and the library built with sanitizers."""
    options = {
        "CMAKE_MAKE_PROGRAM": TOOLS[1],
        "DALLE_SANITIZE": "ON",
        "DALLE_ISAS": ";".join(BUILT),
        "DALLE_TORCH_DIR": Path(torch.__file__).parent,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": BUILD,
    }
    configure = [TOOLS[0], "-G", "Ninja", "-S", ROOT, "-B", BUILD, *(f"-D{k}={v}" for k, v in options.items())]
    for command in (configure, [TOOLS[0], "--build", BUILD]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    source, without = Path(dalle_kernels.__file__).parent, shutil.ignore_patterns("libdalle_*.so", "__pycache__")
    shutil.copytree(source, tmp_path / "dalle_kernels", copy_function=os.symlink, ignore=without)
    (tmp_path / "dalle_kernels" / "libdalle_cpu.so").symlink_to(BUILD / "libdalle_cpu.so")
    return tmp_path


@pytest.mark.parametrize("isa", ISAS)
def test_no_report(package, isa):
    """The working directory is first on Python's path."""
    environment = {
        **os.environ,
        "DALLE_KERNELS_CPU_ISA": isa,
        "LD_PRELOAD": ":".join(map(str, LIBRARIES)),
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16",
        "PYTHONPATH": str(package),
    }
    selected = " or ".join(f"{file} and ({names})" for file, names in TESTS.items())
    options = ["-q", "-s", "-p", "no:cacheprovider", "--hypothesis-profile", "brief", "-m", "not slow", "-k", selected]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(ROOT / "tests" / file for file in TESTS)],
        cwd=package, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert not any(report in done.stdout for report in REPORTS), done.stdout[-20000:]
    assert done.returncode == 0, done.stdout[-5000:]
