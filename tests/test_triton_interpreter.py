"""Runs the tests of the Triton kernels in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
FILES = sorted(
    file.name for file in TESTS.glob("test_triton_*.py") if "\nfrom triton_for_tests import" in file.read_text()
)

pytest.importorskip("triton", "3.9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` checks the kernels on the GPU")
@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_the_kernels_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", file]
    result = subprocess.run(
        command,
        cwd=TESTS,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    print(result.stdout[-20000:], result.stderr[-2000:])
    assert result.returncode == 0
