"""One decode step against PyTorch's attention over caches of the whole sequence.

The paper's sizes: 256 text tokens and 32 x 32 image tokens, in the middle of the image; 8 heads of 64. The step runs
through 4 layers, so that key-value caches are not in the processor's caches. Both sides write the new key and value.
"""

import functools

import pytest
import torch
from common.baselines import PaddedCache
from comparison import SETTING

import dalle_kernels as dk

TEXT, GRID = (4, (4, 4)) if SETTING.tiny else (256, (32, 32))
HEADS, DIM, LAYERS = 8, 64, 4
STEP = GRID[0] * GRID[1] // 2 + GRID[1] // 2
PATTERNS = {
    "row": dk.AttentionPattern.row(TEXT, GRID),
    "column": dk.AttentionPattern.column(TEXT, GRID),
    "conv": dk.AttentionPattern.conv(TEXT, GRID),
}


def filled(make, pattern, new, candidates):
    """A cache of LAYERS layers, created by `make`, with the keys and values before the step."""
    sizes = dict(prompts=1, candidates=candidates, heads=HEADS, head_dim=DIM, dtype=new[0].dtype, start=STEP)
    cache = make([pattern] * LAYERS, **sizes)
    for layer in range(LAYERS):
        cache.prefill(layer, *torch.randn(2, 1, HEADS, TEXT + STEP, DIM).to(new[0].dtype))
    return cache


def ours(pattern, new, candidates):
    cache = filled(dk.DecodeCache, pattern, new, candidates)
    return lambda: [dk.decode_attention(*new, cache, layer) for layer in range(LAYERS)]


def padded(pattern, new, candidates, masked):
    cache = filled(functools.partial(PaddedCache, masked=masked), pattern, new, candidates)
    return lambda: [cache.attend(*new, layer) for layer in range(LAYERS)]


@pytest.mark.parametrize("candidates", [64, 16, 1])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step(versus, dtype, name, candidates):
    """One step through 4 layers, in the middle of an image of 32×32 tokens after 256 text tokens, 8 heads of 64. SDPA
    has caches of the whole sequence: masked reads all of it with the pattern's mask, causal the part that is filled.
    """
    new = torch.randn(3, candidates, HEADS, DIM).to(getattr(torch, dtype)).unbind(0)
    with torch.inference_mode():
        versus(
            ours(PATTERNS[name], new, candidates),
            {
                "masked SDPA": padded(PATTERNS[name], new, candidates, masked=True),
                "causal SDPA": padded(PATTERNS[name], new, candidates, masked=False),
            },
        )
