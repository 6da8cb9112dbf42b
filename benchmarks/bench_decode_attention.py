"""One decode step against PyTorch's attention over padded caches with the pattern as a mask.

The paper's sizes: 256 text tokens, 32 x 32 image tokens, in the middle of the picture; 8 heads of 64, 4 layers in turn
so that their caches are not found in the processor's. Both sides write the new key and value.
"""

import pytest
import torch

import dalle_kernels as dk

TEXT, GRID, HEADS, DIM, LAYERS = 256, (32, 32), 8, 64, 4
STEP = GRID[0] * GRID[1] // 2 + GRID[1] // 2
PATTERNS = {
    "row": dk.AttentionPattern.row(TEXT, GRID),
    "column": dk.AttentionPattern.column(TEXT, GRID),
    "conv": dk.AttentionPattern.conv(TEXT, GRID, kernel=11),
}


def ours(pattern, new, candidates):
    sizes = dict(prompts=1, candidates=candidates, heads=HEADS, head_dim=DIM, dtype=torch.float32, start=STEP)
    cache = dk.DecodeCache([pattern] * LAYERS, **sizes)
    for layer in range(LAYERS):
        cache.write_prefix(layer, *torch.randn(2, 1, HEADS, TEXT + STEP, DIM))

    def step():
        for layer in range(LAYERS):
            dk.decode_attention(*new, cache, layer)

    return step


def padded(pattern, new, candidates):
    token = TEXT + STEP
    shape = LAYERS, candidates, HEADS, pattern.seq_len, DIM
    keys, values = (torch.randn(shape[2:]).expand(shape).contiguous() for _ in range(2))
    mask = pattern.rows(token, token + 1)
    q, k, v = (x[:, :, None] for x in new)

    def step():
        for key, value in zip(keys, values):
            key[:, :, token : token + 1] = k
            value[:, :, token : token + 1] = v
            torch.nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=mask)

    return step


@pytest.mark.parametrize("candidates", [64, 16, 1])
@pytest.mark.parametrize("name", PATTERNS)
def test_step(versus, name, candidates):
    """One step through 4 layers, float32."""
    new = torch.randn(3, candidates, HEADS, DIM).unbind(0)
    with torch.inference_mode():
        versus(
            ours=ours(PATTERNS[name], new, candidates),
            padded_masked_SDPA=padded(PATTERNS[name], new, candidates),
        )
