"""The Triton kernels of decode_attention, step by step against full attention in float64."""

import pytest
import torch
from test_decode_attention import check, decode, make, new_cache, test_strided_inputs  # noqa: F401
from triton_for_tests import DTYPES, ON_GPU, on_device  # noqa: F401

import dalle_kernels as dk
from dalle_kernels.backends.triton import decode_attention, launch
from dalle_kernels.decode_schedule import compile_schedule
from patterns_for_tests import NAMES, every_pattern

P = dk.AttentionPattern

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("name", NAMES)
def test_equals_full_attention(name, dtype, seed):
    """Of 100 text keys, more than a step takes; the mask has more runs of them than are looked at together."""
    pattern = every_pattern(100, (3, 3))[name]
    assert name != "mask" or compile_schedule(pattern).steps[:, 4].max() > decode_attention.RUNS.value
    check(pattern, *make(pattern, 2, 2, 1, 48, dtype), 2, 0, "triton")


def last_steps(pattern, dtype, *, prompts=1, candidates=3, heads=2, dim=64, factor=1.0, steps=2):
    """Checks the last steps of an image."""
    start = pattern.seq_len - pattern.text_len - steps
    check(pattern, *make(pattern, prompts, candidates, heads, dim, dtype, start, factor), prompts, start, "triton")


@dtypes
@pytest.mark.parametrize("name", ["row", "conv-clip", "mask"])
def test_given_image_tokens(name, dtype, seed):
    last_steps(every_pattern(19, (6, 7))[name], dtype, prompts=2, candidates=2, steps=4)


@dtypes
@pytest.mark.parametrize("dim", [1, 33, 127, 128])
def test_head_dims(dim, dtype, seed):
    last_steps(P.conv(37, (6, 6), kernel=3), dtype, dim=dim, candidates=30 if dim == 1 else 3)


@dtypes
def test_blocks_of_candidates(dtype, seed):
    last_steps(P.row(70, (3, 6)), dtype, prompts=2, candidates=17, steps=1)


@dtypes
@pytest.mark.parametrize("text_len", [0, 1, 64, 65])
def test_text_lengths(text_len, dtype, seed):
    last_steps(P.column(text_len, (5, 6)), dtype)


@dtypes
def test_more_image_keys_than_a_step_takes(dtype, seed):
    last_steps(P.causal(3, (13, 10)), dtype)


@dtypes
@pytest.mark.parametrize("factor", [5.0, 40.0])
def test_large_logits(factor, dtype, seed):
    last_steps(P.conv(140, (5, 6), kernel=3), dtype, candidates=5, factor=factor)


@dtypes
def test_bits_do_not_depend_on_the_batch(dtype, seed):
    pattern = P.conv(67, (2, 6), kernel=3)
    q, k, v = make(pattern, 2, 18, 1, 40, dtype)
    together = decode(pattern, q, k, v, 2, backend="triton", steps=2)
    for index in (0, 17, 18, 29):
        alone = [x[index : index + 1] for x in (q, k, v)]
        assert torch.equal(decode(pattern, *alone, 1, backend="triton", steps=2)[0], together[index])


def test_repeating_a_step_changes_nothing(seed):
    pattern = P.row(4, (2, 3))
    q, k, v = make(pattern, 1, 2, 1, 16, torch.float32)
    expected = decode(pattern, q, k, v, 1, backend="triton")
    cache = new_cache(pattern, k, v, 1)
    with dk.use_backend("triton"):
        for step in range(6):
            for _ in range(2):
                out = dk.decode_attention(*(x[:, :, 4 + step] for x in (q, k, v)), cache, 0)
                assert torch.equal(out, expected[:, :, step])
            cache.advance()


def test_scores_that_overflow(seed):
    """Of all text keys of the first step but one, to -inf: weights of 0."""
    pattern = P.row(70, (3, 4))
    q, k, v = make(pattern, 1, 2, 1, 32, torch.float32)
    q[..., 0], q[..., 1:] = 1e20, q[..., 1:] * 1e-3
    k[..., 0] = 0
    k[:, :, :64, 0] = -3e20
    out = decode(pattern, q, k, v, 1, backend="triton", steps=2)
    torch.testing.assert_close(out, decode(pattern, q, k, v, 1, backend="reference", steps=2), rtol=1e-4, atol=1e-5)
    assert out.isfinite().all()


def test_text_that_is_not_seen_may_be_nan(seed):
    mask = torch.ones(22, 22, dtype=torch.bool).tril()
    mask[10:, 3:7] = False
    pattern = P.from_mask(mask, text_len=10)
    q, k, v = make(pattern, 1, 2, 1, 32, torch.float16)
    expected = decode(pattern, q, k, v, 1, backend="triton", steps=2)
    k[:, :, 3:7] = v[:, :, 3:7] = float("nan")
    assert torch.equal(decode(pattern, q, k, v, 1, backend="triton", steps=2), expected)


def step_arguments(pattern, step, heads=2, dim=40):
    """The arguments of the operation at a step, whose earlier keys and values are zeros."""
    q, k, v = make(pattern, 2, 3, heads, dim, torch.float32)
    cache = new_cache(pattern, k, v, 2)
    layer = cache._layers[0]
    token = [x[:, :, pattern.text_len] for x in (q, k, v)]
    storage = layer.prefix_k, layer.prefix_v, layer.image_k.zero_(), layer.image_v.zero_()
    return *token, *storage, layer.schedule, cache.step.fill_(step), 0.2


@pytest.mark.parametrize("step", [-1, 12, 2**40])
def test_a_step_outside_the_image(step, seed):
    """A device cannot raise: the result is NaN, and the cache stays as it is."""
    arguments = step_arguments(P.row(5, (3, 4)), step, heads=1)
    out = torch.ops.dalle_kernels_triton.decode_attention(*arguments)
    assert out.isnan().all() and not arguments[5].any() and not arguments[6].any()


def test_nothing_is_read_on_the_host(monkeypatch):
    """So that a step can be captured as a graph: tensors without data do."""
    started = []
    monkeypatch.setattr(launch, "start", lambda kernel, *arguments, **constants: started.append(kernel))
    *tensors, scale = step_arguments(P.row(5, (3, 4)), 0)
    out = decode_attention._decode_attention(*(x.to("meta") for x in tensors), scale)
    assert out.shape == tensors[0].shape and len(started) == 2


def test_capturable(monkeypatch):
    cache = dk.DecodeCache([P.row(3, (2, 2))], prompts=1, candidates=1, heads=1, head_dim=8, dtype=torch.float32)
    with dk.use_backend("triton"):
        assert cache.capturable == ON_GPU
        monkeypatch.setattr(dk.DecodeCache, "device", torch.device("cuda"))
        assert cache.capturable
    with dk.use_backend("reference"):
        assert not cache.capturable


def test_opcheck(seed):
    arguments = step_arguments(P.conv(5, (3, 4), kernel=3), 2)
    torch.library.opcheck(torch.ops.dalle_kernels_triton.decode_attention.default, arguments)


def test_a_step_compiles_into_one_graph(seed):
    pattern = P.row(6, (2, 2))
    q, k, v = make(pattern, 1, 2, 1, 32, torch.float32)
    expected = decode(pattern, q, k, v, 1, backend="triton")
    cache = new_cache(pattern, k, v, 1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, v):
        out = dk.decode_attention(q, k, v, cache, 0)
        cache.advance()
        return out

    torch._dynamo.reset()
    with dk.use_backend("triton"), torch.inference_mode():
        for token in range(4):
            assert torch.equal(step(*(x[:, :, 6 + token].contiguous() for x in (q, k, v))), expected[:, :, token])
