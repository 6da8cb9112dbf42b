"""The tests of the CPU kernels on every other instruction set that this processor supports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_kernels import build_info

HERE = Path(__file__).parent
FULL = pytest.mark.full
SELECTED = [
    ("test_conformance.py", "(cpu and attention or sparse_attention_of_any_shape) and not compile"),
    ("test_conformance.py", "(cpu and decode or decode_attention_of_any_shape) and not compile"),
    pytest.param("test_conformance.py", "(cpu and gumbel or gumbel_softmax_of_any_shape) and not compile", marks=FULL),
    pytest.param("test_conformance.py", "(cpu and sample or sample_tokens_of_any_shape) and not compile", marks=FULL),
    ("test_sparse_attention.py", "depend or split"),
    ("test_attention_options.py", "cpu"),
    ("test_decode_attention.py", "depend"),
    ("test_gumbel_softmax.py", "depend or classes_last"),
    ("test_sample_tokens.py", "depend"),
    ("test_philox.py", "test"),
]
OTHERS = [isa for isa, supported in build_info.cpu_isas().items() if supported and isa != build_info.active_isa()]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "selected"), SELECTED)
@pytest.mark.parametrize("isa", OTHERS)
def test_on(isa, file, selected):
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest_here, HERE / file, "-m", "not slow", "-k", selected]
    run = subprocess.run(command, env={**os.environ, "DALLE_KERNELS_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-4000:]
