"""The tests of the CPU kernels on every other instruction set that this processor supports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_kernels import build_info

HERE = Path(__file__).parent
SELECTED = {
    "test_sparse_attention.py": "matches_float64 or any_shape or large_logits or hidden_keys or bits_do_not_depend",
    "test_decode_attention.py": "equals_full_attention or bits_do_not_depend_on_the_batch or large_logits",
    "test_gumbel_softmax.py": "matches_float64 or any_shape or broken or threads or draws",
    "test_sample_tokens.py": "not compile and not opcheck",
    "test_philox.py": "test",
}
OTHERS = [isa for isa, supported in build_info.cpu_isas().items() if supported and isa != build_info.active_isa()]


@pytest.mark.slow
@pytest.mark.parametrize("file", SELECTED)
@pytest.mark.parametrize("isa", OTHERS)
def test_on(isa, file):
    selected = f"({SELECTED[file]}) and not reference"
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest_here, HERE / file, "-m", "not slow", "-k", selected]
    run = subprocess.run(command, env={**os.environ, "DALLE_KERNELS_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-4000:]
