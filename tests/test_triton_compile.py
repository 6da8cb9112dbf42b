"""The output of Triton's compiler for the kernels, without a GPU: no spills, shared memory within the limits of the
table, matrix instructions, and pipelined loads.
"""

import itertools

import pytest
import torch
from processes_for_tests import call

from dalle_kernels.backends.triton import launch

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}  # on sm_90 wgmma, on sm_100 tcgen05
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB per block; RTX GPUs use the lines of sm_80
MAIN = {  # kernels with matrix products in a loop
    "sparse_attention": {"_forward", "_grad_q", "_grad_kv"},
    "gumbel_softmax": set(),
    "sample_tokens": set(),
    "decode_attention": {"_text"},
}
FEW_ROWS = {"decode_attention"}  # too few for wgmma and tcgen05

pytest.importorskip("triton")


def compiled(*arguments):
    """{target: [resources of a kernel]} from compile_ahead.py."""
    from triton_ahead import compile_ahead

    return call(compile_ahead.compile_problem, *arguments)


def targets(operation, dtype, size):
    """The GPUs to compile for: those with lines of their own in the launch table, and the oldest one for the lines that
    all others share. All GPUs for the most common head dim or, without a head dim, for 16 bits.
    """
    lines = {line for kernel, table in launch.TABLE.items() if kernel.startswith(operation) for line in table}
    bytes = getattr(torch, dtype).itemsize
    own = {line[0] for line in lines if line[1:] == (size, bytes)}
    everywhere = size == 64 or (bytes == 2 and all(dim == 0 for _, dim, _ in lines))
    return [target for target in MATRIX if everywhere or target in own or target == "sm_80"]


PROBLEMS = [
    *itertools.product(["sparse_attention"], ["bfloat16", "float32"], [64, 32, 128]),
    ("gumbel_softmax", "float32", 8192),
    ("gumbel_softmax", "bfloat16", 20),
    ("sample_tokens", "bfloat16", 8192),
    ("sample_tokens", "float32", 50000),
    *itertools.product(["decode_attention"], ["bfloat16", "float32"], [64, 32, 128]),
]
USUAL = {operation: (operation, *rest) for operation, *rest in reversed(PROBLEMS)}.values()  # the first of each


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "dtype", "size"),
    [pytest.param(*problem, marks=[] if problem in USUAL else pytest.mark.full) for problem in PROBLEMS],
)
def test_kernels_for_every_gpu(operation, dtype, size):
    for target, kernels in compiled(operation, dtype, size, *targets(operation, dtype, size)).items():
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
    kernels = compiled("sparse_attention_of_one_head", "float32", 32, "sm_90")["sm_90"]
    assert {resources["kernel"] for resources in kernels} >= MAIN["sparse_attention"]
    assert not any(resources["spilled"] for resources in kernels), kernels
