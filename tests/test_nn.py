"""dk.nn.SparseAttention against torch.nn.MultiheadAttention with the same weights and the pattern as a mask."""

import re

import pytest
import torch

import dalle_kernels as dk


def test_equals_multihead_attention(seed):
    pattern = dk.AttentionPattern.conv(7, (5, 6), kernel=3)
    ours = dk.nn.SparseAttention(48, 3, pattern)
    theirs = torch.nn.MultiheadAttention(48, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    for n in (37, 20):
        x = torch.randn(2, n, 48)
        expected, _ = theirs(x, x, x, attn_mask=~pattern.dense()[:n, :n], need_weights=False)
        torch.testing.assert_close(ours(x), expected)


def test_is_an_ordinary_module(seed):
    pattern = dk.AttentionPattern.row(3, (2, 2))
    module = dk.nn.SparseAttention(32, 2, pattern, bias=False)
    assert sum(p.numel() for p in module.parameters()) == 4 * 32 * 32
    assert "row" in repr(module)
    module(torch.randn(1, 7, 32)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(("dim", "heads"), [(30, 4), (512, 2), (16, 0)])
def test_bad_sizes_are_refused(dim, heads):
    with pytest.raises(ValueError, match=f"dim={dim}, heads={heads}"):
        dk.nn.SparseAttention(dim, heads, dk.AttentionPattern.row(3, (2, 2)))


@pytest.mark.parametrize("shape", [(7, 32), (1, 2, 7, 32), (1, 7, 31)], ids=str)
def test_bad_shapes_are_refused(shape):
    module = dk.nn.SparseAttention(32, 2, dk.AttentionPattern.row(3, (2, 2)))
    with pytest.raises(ValueError, match=r"x must have the shape \[B, N, 32\]; got " + re.escape(str(list(shape)))):
        module(torch.zeros(shape))


@pytest.mark.parametrize("candidates", [1, 3])
def test_steps_against_a_cache_equal_the_whole_sequence(seed, candidates):
    """A cache of two layers, the second for the module, with two given image tokens."""
    pattern, text, start = dk.AttentionPattern.row(5, (3, 4)), 5, 2
    module = dk.nn.SparseAttention(48, 3, pattern).double()
    prefix, rest = torch.randn(2, text + start, 48).double(), torch.randn(2 * candidates, 10, 48).double()
    whole = torch.cat([prefix.repeat_interleave(candidates, 0), rest], 1)
    sizes = dict(prompts=2, candidates=candidates, heads=3, head_dim=16, dtype=torch.float64)
    with torch.inference_mode():
        cache = dk.DecodeCache([pattern] * 2, start=start, **sizes)
        expected = module(whole)
        given = module(prefix, cache, 1)
        torch.testing.assert_close(given.repeat_interleave(candidates, 0), expected[:, : text + start])
        for i in range(rest.shape[1]):
            torch.testing.assert_close(module.step(rest[:, i], cache, 1), expected[:, text + start + i])
            cache.advance()
