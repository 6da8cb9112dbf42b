"""One decode step against PyTorch's attention over caches of the whole sequence.

The paper's sizes: 256 text tokens, 32 x 32 image tokens, in the middle of the picture; 8 heads of 64, 4 layers in turn
so that their caches are not found in the processor's. Both sides write the new key and value.
"""

import pytest
import torch
from comparison import SETTING
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_kernels as dk

TEXT, GRID = (4, (4, 4)) if SETTING.tiny else (256, (32, 32))
HEADS, DIM, LAYERS = 8, 64, 4
STEP = GRID[0] * GRID[1] // 2 + GRID[1] // 2
PATTERNS = {
    "row": dk.AttentionPattern.row(TEXT, GRID),
    "column": dk.AttentionPattern.column(TEXT, GRID),
    "conv": dk.AttentionPattern.conv(TEXT, GRID),
}


def ours(pattern, new, candidates):
    sizes = dict(prompts=1, candidates=candidates, heads=HEADS, head_dim=DIM, dtype=new[0].dtype, start=STEP)
    cache = dk.DecodeCache([pattern] * LAYERS, **sizes)
    for layer in range(LAYERS):
        cache.prefill(layer, *torch.randn(2, 1, HEADS, TEXT + STEP, DIM).to(new[0].dtype))

    def step():
        for layer in range(LAYERS):
            dk.decode_attention(*new, cache, layer)

    return step


def sdpa_over_caches(pattern, new, candidates, masked):
    """SDPA over caches of the whole sequence: all of them under the pattern's mask, or the filled part causally."""
    token = TEXT + STEP
    shape = LAYERS, candidates, HEADS, pattern.seq_len, DIM
    keys, values = (torch.randn(shape[2:]).to(new[0].dtype).expand(shape).contiguous() for _ in range(2))
    mask = pattern.dense(token, token + 1) if masked else None
    seen = slice(None) if masked else slice(token + 1)
    q, k, v = (x[:, :, None] for x in new)

    def step():
        for key, value in zip(keys, values):
            key[:, :, token : token + 1] = k
            value[:, :, token : token + 1] = v
            sdpa(q, key[:, :, seen], value[:, :, seen], attn_mask=mask)

    return step


@pytest.mark.parametrize("candidates", [64, 16, 1])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step(versus, dtype, name, candidates):
    """One step through 4 layers, in the middle of a picture of 32×32 tokens after 256 text tokens, 8 heads of 64. SDPA
    has caches of the whole sequence: masked reads all of them under the pattern's mask, causal all that is filled.
    """
    new = torch.randn(3, candidates, HEADS, DIM).to(getattr(torch, dtype)).unbind(0)
    with torch.inference_mode():
        versus(
            ours(PATTERNS[name], new, candidates),
            {
                "masked SDPA": sdpa_over_caches(PATTERNS[name], new, candidates, masked=True),
                "causal SDPA": sdpa_over_caches(PATTERNS[name], new, candidates, masked=False),
            },
        )
