"""The options of sparse_attention and of the decode cache: what each costs, and against SDPA with the same option. Row
attention, float32.
"""

import pytest
import torch
from comparison import SETTING
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_kernels as dk

BATCH, HEADS, DIM = (1, 2, 32) if SETTING.tiny else (2, 8, 64)
TEXT, GRID = (8, (4, 4)) if SETTING.tiny else (256, (32, 32))
LEAST = 0.0 if SETTING.tiny else 2e-3  # seconds of a sample
P = dk.AttentionPattern


def plain():
    """(q, k, v, pattern, options of ours, mask, options of SDPA) without an option."""
    pattern = P.row(TEXT, GRID)
    q, k, v = torch.randn(3, BATCH, HEADS, pattern.seq_len, DIM)
    return q, k, v, pattern, {}, pattern.dense(), {}


def text_lengths():
    """Half of the text exists, on average."""
    q, k, v, pattern, _, mask, _ = plain()
    lengths = torch.linspace(0, TEXT, BATCH + 2)[1:-1].long()
    exists = (torch.arange(pattern.seq_len) < lengths[:, None]) | (torch.arange(pattern.seq_len) >= TEXT)
    mask = (mask & exists[:, None]) | torch.eye(pattern.seq_len, dtype=torch.bool)  # SDPA has no empty rows
    return q, k, v, pattern, {"text_lengths": lengths}, mask[:, None], {}


def dropout():
    q, k, v, pattern, _, mask, _ = plain()
    return q, k, v, pattern, {"dropout_p": 0.1}, mask, {"dropout_p": 0.1}


def grouped_queries():
    """Two heads of q to one of k and v."""
    q, k, v, pattern, _, mask, _ = plain()
    return q, k[:, ::2].contiguous(), v[:, ::2].contiguous(), pattern, {}, mask, {"enable_gqa": True}


def last_queries():
    """Queries of the last row of the image only."""
    q, k, v, pattern, _, mask, _ = plain()
    return q[:, :, -GRID[1] :].contiguous(), k, v, pattern, {}, mask[-GRID[1] :], {}


def not_causal():
    """All text, and image tokens as far apart as in row attention, on both sides."""
    q, k, v, _, _, mask, _ = plain()
    mask = mask | mask.T
    pattern = P.from_mask(mask, TEXT, causal=False)
    return q, k, v, pattern, {}, mask, {}


def passes(function, tensors, backward):
    if not backward:
        return lambda: function(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    grad = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


@pytest.mark.parametrize("option", [text_lengths, dropout, grouped_queries, last_queries, not_causal])
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def test_option(versus, direction, option):
    """256 + 32×32 tokens, batch 2, 8 heads of 64."""
    q, k, v, pattern, options, mask, sdpa_options = option()
    calls = {
        "ours": (lambda q, k, v: dk.sparse_attention(q, k, v, pattern, **options), (q, k, v)),
        "SDPA with the mask": (lambda q, k, v: sdpa(q, k, v, attn_mask=mask, **sdpa_options), (q, k, v)),
    }
    *tensors, without, _, _, _ = plain()
    calls["ours without it"] = (lambda q, k, v: dk.sparse_attention(q, k, v, without), tensors)
    functions = {name: passes(*call, direction != "forward") for name, call in calls.items()}
    versus(functions.pop("ours"), functions)


def cache_of(**options):
    return dk.DecodeCache(
        [P.row(TEXT, GRID)], prompts=BATCH, heads=HEADS, head_dim=DIM, dtype=torch.float32, device="cpu", **options
    )


@pytest.mark.parametrize("candidates", [1, 16])
def test_decode_with_text_lengths(versus, candidates):
    """One decode step; half of the text exists, on average."""
    lengths = torch.linspace(0, TEXT, BATCH + 2)[1:-1].long()
    new = torch.randn(3, candidates * BATCH, HEADS, DIM)
    caches = {
        "ours": cache_of(candidates=candidates, text_lengths=lengths),
        "ours without it": cache_of(candidates=candidates),
    }
    for cache in caches.values():
        cache.prefill(0, *torch.randn(2, BATCH, HEADS, TEXT, DIM))

    def step(cache):
        return lambda: dk.decode_attention(*new, cache, 0)

    functions = {name: step(cache) for name, cache in caches.items()}
    with torch.inference_mode():
        versus(functions.pop("ours"), functions, least=LEAST, unit="µs")


@pytest.mark.parametrize("position", [TEXT - 1])
def test_decode_text(versus, position):
    """One text token of one candidate: from the cache, and as the last query over its keys."""
    cache, pattern = cache_of(candidates=1), P.row(TEXT, GRID)
    q, k, v = torch.randn(3, BATCH, HEADS, position + 1, DIM)
    cache.prefill(0, k[:, :, :position], v[:, :, :position])
    new = [x[:, :, -1] for x in (q, k, v)]
    with torch.inference_mode():
        functions = {"as a last query": lambda: dk.sparse_attention(q[:, :, -1:], k, v, pattern)}
        versus(lambda: dk.decode_attention(*new, cache, 0), functions, least=LEAST, unit="µs")
