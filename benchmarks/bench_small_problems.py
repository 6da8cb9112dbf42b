"""Small problems, dominated by the overhead of calls and threads: one head, batch 1, small images; and calls with
almost no computation.
"""

import pytest
import torch
from comparison import SETTING
from torch.nn.functional import gumbel_softmax
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_kernels as dk

LEAST = 0.0 if SETTING.tiny else 2e-3  # seconds of a sample
P = dk.AttentionPattern
PATTERNS = {"row": P.row, "column": P.column, "conv": lambda text, grid: P.conv(text, grid, kernel=5)}


def passes(attention, tensors, grad):
    """The forward pass or, with `grad`, both. Tests enter inference mode outside, because entering it takes time."""
    if grad is not None:
        return lambda: torch.autograd.grad(attention(*tensors), tensors, grad)
    return lambda: attention(*tensors)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize(("text", "side"), [(16, 8), (32, 16)])
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def test_one_head(versus, direction, text, side, dim, name):
    """Text tokens, side of the image in tokens, head dim, pattern (convolution with a 5×5 window); float32."""
    pattern = PATTERNS[name](text, (side, side))
    mask, backward = pattern.dense(), direction != "forward"
    tensors = [torch.randn(1, 1, pattern.seq_len, dim, requires_grad=backward) for _ in range(3)]
    grad = torch.randn_like(tensors[0]) if backward else None
    attentions = {
        "ours": lambda q, k, v: dk.sparse_attention(q, k, v, pattern),
        "causal SDPA": lambda q, k, v: sdpa(q, k, v, is_causal=True),
        "masked SDPA": lambda q, k, v: sdpa(q, k, v, attn_mask=mask),
    }
    functions = {key: passes(attention, tensors, grad) for key, attention in attentions.items()}
    with torch.inference_mode(not backward):
        versus(functions.pop("ours"), functions, least=LEAST, unit="µs")


def attention_call(backward):
    pattern = P.causal(1, (1, 1))
    tensors = [torch.randn(1, 1, 2, 32, requires_grad=backward) for _ in range(3)]
    grad = torch.randn_like(tensors[0]) if backward else None
    return (
        passes(lambda q, k, v: dk.sparse_attention(q, k, v, pattern), tensors, grad),
        passes(lambda q, k, v: sdpa(q, k, v, is_causal=True), tensors, grad),
    )


def gumbel_call(backward):
    logits = [torch.randn(1, 32, requires_grad=backward)]
    grad = torch.randn(1, 32) if backward else None
    return passes(dk.gumbel_softmax, logits, grad), passes(gumbel_softmax, logits, grad)


def decode_call():
    new = torch.randn(3, 1, 1, 32).unbind(0)
    cache = dk.DecodeCache([P.causal(1, (1, 2))], prompts=1, candidates=1, heads=1, head_dim=32, dtype=torch.float32)
    cache.prefill(0, *torch.randn(2, 1, 1, 1, 32))
    q, k, v = (x[:, :, None] for x in new)
    return passes(lambda: dk.decode_attention(*new, cache, 0), [], None), passes(lambda: sdpa(q, k, v), [], None)


def sample_call():
    logits = [torch.randn(1, 32)]
    return passes(dk.sample_tokens, logits, None), passes(lambda x: torch.multinomial(x.softmax(-1), 1), logits, None)


CALLS = {
    "sparse_attention, forward": lambda: attention_call(False),
    "sparse_attention, forward and backward": lambda: attention_call(True),
    "gumbel_softmax, forward": lambda: gumbel_call(False),
    "gumbel_softmax, forward and backward": lambda: gumbel_call(True),
    "decode_attention": decode_call,
    "sample_tokens": sample_call,
}


@pytest.mark.parametrize("operation", CALLS)
def test_call(versus, operation):
    """Calls with almost no computation, against PyTorch: SDPA, F.gumbel_softmax, multinomial."""
    ours, plain = CALLS[operation]()
    with torch.inference_mode("backward" not in operation):
        versus(ours, {"PyTorch": plain}, least=LEAST, unit="µs")
