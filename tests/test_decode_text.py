"""Text in the decode cache: prefill in chunks, and text that is decoded token by token. test_conformance.py has the
error bound on every backend.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_kernels as dk
from conformance import Target
from conformance.decode_attention import decode, make, new_cache
from patterns_for_tests import NAMES, every_pattern

CPU, REFERENCE = Target("cpu"), Target("reference")
P = dk.AttentionPattern


def a_cache(pattern, candidates=1, start=0, prompts=2, layers=1, **options):
    sizes = dict(prompts=prompts, candidates=candidates, heads=2, head_dim=8, dtype=torch.float32)
    return dk.DecodeCache([pattern] * layers, **sizes, start=start, **options)


def storage(cache):
    layer = cache.layer(0)
    return layer.prefix_k, layer.prefix_v, layer.image_k, layer.image_v


@settings(max_examples=15)
@given(name=st.sampled_from(NAMES), text_len=st.integers(0, 9), grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
       data=st.data())  # fmt: skip
def test_text_and_image_token_by_token_equal_the_whole_sequence(name, text_len, grid, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    pattern, held = every_pattern(text_len, grid)[name], data.draw(st.integers(0, text_len))
    q, k, v = make(CPU, pattern, 2, 1, 2, 7, torch.float64)
    whole = dk.sparse_attention(q, k, v, pattern, backend="reference")[:, :, held:]
    torch.testing.assert_close(decode(REFERENCE, pattern, q, k, v, 2, given=held), whole, rtol=0, atol=1e-12)


@settings(max_examples=15)
@given(name=st.sampled_from(NAMES), text_len=st.integers(0, 9), grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
       candidates=st.integers(1, 3), data=st.data())  # fmt: skip
def test_chunks_store_what_one_prefill_stores(name, text_len, grid, candidates, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    pattern, start = every_pattern(text_len, grid)[name], data.draw(st.integers(0, grid[0] * grid[1] - 1))
    _, k, v = make(CPU, pattern, 2, candidates, 2, 8, torch.float32, start)
    prefix = text_len + start
    cuts = sorted(data.draw(st.lists(st.integers(0, prefix), max_size=4), label="cuts"))
    one = new_cache(pattern, k, v, 2, start)
    chunks = new_cache(pattern, k, v, 2, start, given=0)
    for first, end in itertools.pairwise([0, *cuts, prefix]):
        chunks.prefill(0, k[::candidates, :, first:end], v[::candidates, :, first:end])
    for a, b in zip(storage(one), storage(chunks), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert one.next_position(0) == chunks.next_position(0) == 0


def test_a_chunk_between_decoded_tokens(seed):
    pattern = P.conv(9, (3, 3), kernel=3)
    q, k, v = make(CPU, pattern, 2, 1, 2, 8, torch.float32)
    expected = decode(CPU, pattern, q, k, v, 2, given=0)
    cache = new_cache(pattern, k, v, 2, given=2)
    for token in (2, 3, *range(7, 18)):
        if token == 7:
            cache.prefill(0, k[:, :, 4:7], v[:, :, 4:7])
        for _ in range(2):  # repeating a call within a step changes nothing
            out = dk.decode_attention(*(x[:, :, token] for x in (q, k, v)), cache, 0)
            assert torch.equal(out, expected[:, :, token])
        cache.advance()


def test_reset_returns_to_a_text_token(seed):
    pattern = P.row(5, (2, 2))
    q, k, v = make(CPU, pattern, 2, 1, 2, 8, torch.float32)
    other = torch.randn(3, 2, 2, 9, 8)
    cache = new_cache(pattern, k, v, 2)
    for keep, (a, b, c) in ((3, other), (3, (q, k, v)), (0, other), (0, (q, k, v))):
        cache.reset(text=keep)
        expected = [torch.cat([x[:, :, :keep], y[:, :, keep:]], 2) for x, y in zip((q, k, v), (a, b, c))]
        expected = decode(CPU, pattern, *expected, 2, given=keep)
        for token in range(keep, 9):
            out = dk.decode_attention(*(x[:, :, token] for x in (a, b, c)), cache, 0)
            assert torch.equal(out, expected[:, :, token - keep])
            cache.advance()
        assert int(cache.step) == 4


def test_a_text_step_that_a_prefill_replaces(seed):
    cache = a_cache(P.row(3, (2, 2)))
    cache.prefill(0, *torch.zeros(2, 2, 2, 2, 8))
    cache.reset(text=3)
    assert cache.next_position(0) == 2  # reset does not make text that was never there
    dk.decode_attention(*torch.zeros(3, 2, 2, 8), cache, 0)
    cache.prefill(0, *torch.zeros(2, 2, 2, 1, 8))
    dk.decode_attention(*torch.zeros(3, 2, 2, 8), cache, 0)
    cache.advance()
    assert int(cache.step) == 1 and not cache.decodes_text(0)


def test_given_image_tokens_follow_decoded_text(seed):
    pattern = P.row(2, (2, 3))
    q, k, v = make(CPU, pattern, 2, 1, 2, 8, torch.float32)
    expected = decode(CPU, pattern, q, k, v, 2, start=2)
    cache = new_cache(pattern, k, v, 2, start=2, given=0)
    for token in range(2):
        dk.decode_attention(*(x[:, :, token] for x in (q, k, v)), cache, 0)
        cache.advance()
    with pytest.raises(ValueError, match=r"layer 0 holds 2 of the text_len \+ start = 4 .* with the others first$"):
        dk.decode_attention(*(x[:, :, 4] for x in (q, k, v)), cache, 0)
    cache.prefill(0, k[:, :, 2:4], v[:, :, 2:4])
    assert torch.equal(dk.decode_attention(*(x[:, :, 4] for x in (q, k, v)), cache, 0), expected[:, :, 0])


def test_a_caption_is_completed_by_a_module(seed):
    """Each sequence of a module continues its first text tokens as the whole sequence does."""
    pattern = P.row(6, (2, 3))
    attention, x = dk.nn.SparseAttention(16, 2, pattern), torch.randn(2, 12, 16)
    with torch.inference_mode():
        expected, cache = attention(x), a_cache(pattern)
        outputs = [attention(x[:, :3], cache), attention(x[:, 3:4], cache)]
        for token in range(4, 12):
            outputs.append(attention.step(x[:, token], cache)[:, None])
            cache.advance()
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-6)


def test_a_module_takes_the_given_tokens_at_once(seed):
    pattern = P.row(4, (2, 3))
    attention, x = dk.nn.SparseAttention(16, 2, pattern), torch.randn(2, 7, 16)
    with torch.inference_mode():
        cache = a_cache(pattern, candidates=2, start=3)
        parts = [attention(part, cache) for part in (x[:, :3], x[:, 3:])]
        torch.testing.assert_close(torch.cat(parts, 1), attention(x), rtol=0, atol=1e-6)
        attention(x[:, :6], cache)
        with pytest.raises(ValueError, match=r"all 3 given image tokens, .* layer 0 already holds 2"):
            attention(x[:, 6:], cache)


# -- errors


@pytest.mark.parametrize(("held", "candidates", "hint"), [(0, 2, True), (3, 2, True), (5, 2, False), (5, 1, False)])
def test_a_step_before_the_prefix_is_complete(held, candidates, hint):
    cache = a_cache(P.row(5, (2, 2)), candidates, start=1)
    cache.prefill(0, *torch.zeros(2, 2, 2, held, 8))
    message = (
        rf"holds {held} of the text_len \+ start = 6 prefix tokens; call cache\.prefill\(0, k, v\) with the others"
    )
    with pytest.raises(ValueError, match=message) as error:
        dk.decode_attention(*torch.zeros(3, 2 * candidates, 2, 8), cache, 0)
    assert ("text can be decoded token by token with candidates=1 only" in str(error.value)) == hint


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda cache: cache.prefill(0, *torch.zeros(2, 2, 2, 4, 8)),
            "at most 3 tokens, .* 2 .* got 4 .*use scaled_dot",
        ),
        (lambda cache: cache.prefill(0, *torch.zeros(2, 2, 3, 1, 8)), r"\[2, 2, 1, 8\]; got \[2, 3, 1, 8\]"),
        (lambda cache: cache.prefill(0, *torch.zeros(2, 2, 1, 8)), r"\[2, 2, 5, 8\]; got \[2, 1, 8\]"),
        (lambda cache: cache.reset(text=6), r"text must lie in \[0, 5\], the patterns' text_len; got 6"),
        (lambda cache: cache.reset(text=-1), "got -1"),
    ],
)
def test_what_a_cache_refuses(call, message):
    cache = a_cache(P.row(5, (2, 2)))
    cache.prefill(0, *torch.ones(2, 2, 2, 2, 8))
    before = [x[:, :, :2].clone() for x in storage(cache)[:2]]
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert all(torch.equal(a, b[:, :, :2]) for a, b in zip(before, storage(cache))) and cache.next_position(0) == 2
