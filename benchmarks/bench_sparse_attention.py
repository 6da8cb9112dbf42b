"""Sparse attention at the paper's shape against dense attention (causal SDPA, SDPA with the pattern as a boolean mask,
and our own kernel run dense), FlexAttention, and the pattern in plain PyTorch.
"""

from dataclasses import replace

import pytest
import torch
from common.attention import Case, Inputs, flex, shrink
from common.plain_attention import plain_attention
from comparison import ROUNDS, SETTING, attempt, fastest, need_compiler
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_kernels as dk

P = dk.AttentionPattern
PATTERNS = ("row", "column", "conv")
FLEX_BLOCKS, PLAIN_ROWS = (128, 64, 32), (1, 2, 4)
CASES = [*((name, dtype) for dtype in ("float32", "bfloat16") for name in PATTERNS), ("row", "float16")]


def case_of(name, dtype, direction):
    case = Case(name, direction, batch=2, heads=8, dtype=dtype)
    return replace(shrink(case), dtype=dtype) if SETTING.tiny else case


def causal(q, k, v):
    return sdpa(q, k, v, is_causal=True)


def ours(pattern):
    return lambda q, k, v: dk.sparse_attention(q, k, v, pattern)


def best_flex(inputs):
    """FlexAttention with the fastest of its block sizes."""
    if not SETTING.tiny:
        need_compiler()
    torch.compiler.reset()
    return fastest([flex(inputs, "raster", block, SETTING) for block in FLEX_BLOCKS])


def best_plain(inputs):
    """Plain PyTorch with the fastest number of rows per block."""
    return fastest([inputs.function(plain_attention(inputs.pattern, rows)) for rows in PLAIN_ROWS])


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_paper_shape(versus, name, dtype, direction):
    """256 text tokens, 32×32 image tokens, batch 2, 8 heads of 64. A backward pass is timed alone. The pair ceiling is
    dense causal pairs / allowed pairs: the speed-up predicted by sparsity alone. FlexAttention and plain PyTorch use
    their fastest block sizes. 3 rounds for float16.
    """
    inputs = Inputs(case_of(name, dtype, direction), "cpu")
    pattern, mask = inputs.pattern, inputs.pattern.dense()
    dense = P.causal(pattern.text_len, pattern.grid)
    versus(
        inputs.function(ours(pattern)),
        {
            "causal SDPA": inputs.function(causal),
            "masked SDPA": inputs.function(lambda q, k, v: sdpa(q, k, v, attn_mask=mask)),
            "FlexAttention": attempt(lambda: best_flex(inputs)),
            "plain PyTorch": best_plain(inputs),
            "ours, dense causal": inputs.function(ours(dense)),
        },
        rounds=3 if dtype == "float16" else ROUNDS,
        facts={"pair ceiling": dense.nnz / pattern.nnz},
    )


HARD = {
    "queries x 20": lambda q, k, v: (20 * q, k, v),
    "queries x 40": lambda q, k, v: (40 * q, k, v),
    "denormal": lambda q, k, v: (1e-39 * q, 1e-39 * k, 1e-39 * v),
}


@pytest.mark.parametrize("values", HARD)
@pytest.mark.parametrize(
    ("direction", "dtype"), [("forward", "float32"), ("forward", "bfloat16"), ("backward", "float32")]
)
def test_hard_values(versus, values, dtype, direction):
    """Row attention at the paper's shape on values that slow processors down; a ratio of "ours, randn" below 1 is the
    cost of these values.
    """
    inputs = {kind: Inputs(case_of("row", dtype, direction), "cpu") for kind in ("randn", "hard")}
    with torch.no_grad():
        for tensor, hard in zip(inputs["hard"].tensors, HARD[values](*inputs["randn"].tensors)):
            tensor.copy_(hard)
    attention = ours(inputs["randn"].pattern)
    versus(
        inputs["hard"].function(attention),
        {
            "ours, randn": inputs["randn"].function(attention),
            "causal SDPA": inputs["hard"].function(causal),
            "causal SDPA, randn": inputs["randn"].function(causal),
        },
    )
