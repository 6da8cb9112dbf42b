"""What Triton makes of our kernels for GPUs that are not here: nothing spilled, shared memory within what the table
promises, matrix instructions, and loads that run ahead of their use.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}  # on sm_90 wgmma, on sm_100 tcgen05
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB of a block; RTX GPUs take the lines of sm_80
MAIN = {  # the kernels that multiply matrices in a loop
    "sparse_attention": {"_forward", "_grad_q", "_grad_kv"},
    "gumbel_softmax": set(),
    "sample_tokens": set(),
    "decode_attention": {"_text"},
}
FEW_ROWS = {"decode_attention"}  # too few for wgmma and tcgen05

pytest.importorskip("triton")


def compiled(*arguments):
    """{target: [resources of a kernel]} of compile_ahead.py."""
    command = [sys.executable, "-m", "tests.triton_ahead.compile_ahead", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


PROBLEMS = [
    *itertools.product(["sparse_attention"], ["bfloat16", "float32"], ["32", "64", "128"]),
    ("gumbel_softmax", "bfloat16", "20"),
    ("gumbel_softmax", "float32", "8192"),
    ("sample_tokens", "bfloat16", "8192"),
    ("sample_tokens", "float32", "50000"),
    *itertools.product(["decode_attention"], ["bfloat16", "float32"], ["32", "64", "128"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "dtype", "size"), PROBLEMS)
def test_kernels_for_every_gpu(operation, dtype, size):
    for target, kernels in compiled(operation, dtype, size, *MATRIX).items():
        assert {resources["kernel"] for resources in kernels} >= MAIN[operation]
        for resources in kernels:
            what = f"{target}: {resources}"
            assert resources["spilled"] == 0, what
            assert resources["shared"] <= SHARED[target] * 1024, what
            if resources["kernel"] in MAIN[operation]:
                matrix = "HMMA" if operation in FEW_ROWS and target != "gfx942" else MATRIX[target]
                assert dtype == "float32" or resources[matrix], what
                assert target == "gfx942" or resources["LDGSTS"], what  # cp.async


@pytest.mark.slow
def test_one_head():
    kernels = compiled("sparse_attention_of_one_head", "float32", "32", "sm_90")["sm_90"]
    assert {resources["kernel"] for resources in kernels} >= MAIN["sparse_attention"]
    assert not any(resources["spilled"] for resources in kernels), kernels
