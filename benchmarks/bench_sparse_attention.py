"""Sparse attention at the paper's shape against dense attention: causal SDPA, SDPA with the pattern as a boolean
mask, and our own kernel run dense.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_kernels as dk

TEXT, GRID, BATCH, HEADS, DIM = 256, (32, 32), 2, 8, 64
CAUSAL = dk.AttentionPattern.causal(TEXT, GRID)
PATTERNS = {
    "row": dk.AttentionPattern.row(TEXT, GRID),
    "column": dk.AttentionPattern.column(TEXT, GRID),
    "conv": dk.AttentionPattern.conv(TEXT, GRID),
}
cases = pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for dtype in ("float32", "bfloat16") for name in PATTERNS], ids=lambda x: x
)


def inputs(dtype):
    return torch.randn(3, BATCH, HEADS, CAUSAL.seq_len, DIM).to(getattr(torch, dtype)).unbind(0)


def attentions(name):
    pattern, mask = PATTERNS[name], PATTERNS[name].dense()
    return {
        "ours": lambda q, k, v: dk.sparse_attention(q, k, v, pattern),
        "causal_SDPA": lambda q, k, v: sdpa(q, k, v, is_causal=True),
        "masked_SDPA": lambda q, k, v: sdpa(q, k, v, attn_mask=mask),
        "ours_dense_causal": lambda q, k, v: dk.sparse_attention(q, k, v, CAUSAL),
    }


@cases
def test_forward(versus, name, dtype):
    tensors = inputs(dtype)
    with torch.inference_mode():
        versus(**{key: lambda f=f: f(*tensors) for key, f in attentions(name).items()})


@cases
def test_backward(versus, name, dtype):
    """The backward pass alone: the graph is built once and kept."""
    leaves = [x.clone().requires_grad_() for x in inputs(dtype)]
    grad = torch.randn_like(leaves[0])

    def backward(attention):
        out = attention(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    versus(**{key: backward(f) for key, f in attentions(name).items()})
