"""The CUDA kernel of decode_attention under emulation, step by step against full attention in float64."""

import pytest
import torch
from cuda_emulation import emulated
from test_decode_attention import DTYPES, make, new_cache, plain_attention

import dalle_kernels as dk
from accuracy import assert_accurate
from patterns_for_tests import NAMES, every_pattern

P = dk.AttentionPattern


def attend(q, k, v, cache, **options):
    """One step of the emulated operation, on the tensors of the cache's first layer."""
    layer = cache._layers[0]
    storage = layer.prefix_k, layer.prefix_v, layer.image_k, layer.image_v
    return emulated.run(
        "decode_attention", q, k, v, *storage, layer.schedule, cache.step, q.shape[-1] ** -0.5, **options
    )


def decode(pattern, q, k, v, prompts, start=0, steps=None, **options):
    """The image's rows of the output, one step at a time: [P * C, H, steps, D]. `steps`: which, from `start` on."""
    first = pattern.text_len + start
    cache, out = new_cache(pattern, k, v, prompts, start), []
    for token in range(first, pattern.seq_len if steps is None else first + steps):
        out.append(attend(q[:, :, token], k[:, :, token], v[:, :, token], cache, **options))
        cache.advance()
    return torch.stack(out, 2)


def check(pattern, q, k, v, prompts, start=0, steps=None):
    first = pattern.text_len + start
    rows = slice(first, None if steps is None else first + steps)
    mask = pattern.dense()[rows]
    exact = plain_attention(q[:, :, rows].double(), k.double(), v.double(), mask)
    plain = plain_attention(q[:, :, rows], k, v, mask)
    out = decode(pattern, q, k, v, prompts, start, steps)
    assert_accurate(out, exact, plain, f"cuda decode_attention out {q.dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_full_attention(name, dtype, seed):
    pattern = every_pattern(19, (4, 5))[name]
    for start in (0, 7):
        check(pattern, *make(pattern, 2, 3, 2, 48, dtype, start), 2, start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 31, 32, 33, 64, 80, 127, 128])
def test_head_dims(dim, dtype, seed):
    pattern = P.conv(37, (2, 5), kernel=3)
    check(pattern, *make(pattern, 1, 2, 3 if dim > 16 else 40, dim, dtype), 1, steps=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("candidates", [1, 5, 16, 17, 40])
def test_candidates_and_prompts(candidates, dtype, seed):
    pattern = P.row(70, (2, 6))
    check(pattern, *make(pattern, 2, candidates, 2, 64, dtype, start=5), 2, 5, steps=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text_len", [0, 1, 16, 127, 300])
def test_text_lengths(text_len, dtype, seed):
    pattern = P.column(text_len, (3, 4))
    check(pattern, *make(pattern, 1, 3, 3, 64, dtype), 1, steps=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_keys_than_are_listed_at_a_time(dtype, seed):
    pattern = P.causal(1100, (33, 32))
    start = 32 * 33 - 1
    check(pattern, *make(pattern, 1, 2, 3, 64, dtype, start), 1, start)


@pytest.mark.parametrize("factor", [5.0, 40.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(factor, dtype, seed):
    pattern = P.conv(140, (5, 6), kernel=3)
    check(pattern, *make(pattern, 1, 16, 4, 64, dtype, start=14, factor=factor), 1, 14, steps=6)


@pytest.mark.parametrize("layout", ["qkv", "heads_last", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(dtype, layout, seed):
    """The bits are those of contiguous inputs, for rows too that are not aligned to 16 bytes."""
    pattern = P.row(6, (3, 4))
    _, k, v = make(pattern, 2, 5, 3, 24, dtype)
    new = torch.randn(3, 10, 3, 24).to(dtype)
    if layout == "qkv":
        views = new.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    elif layout == "heads_last":
        views = new.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    else:
        views = torch.full((3, 10, 3, 27), torch.nan, dtype=dtype)[..., 1:25].copy_(new)
    assert not views[0].is_contiguous()
    caches = [new_cache(pattern, k, v, 2) for _ in range(2)]
    assert torch.equal(attend(*views, caches[0]), attend(*new, caches[1]))
    for name in ("image_k", "image_v"):
        written, expected = (getattr(cache._layers[0], name) for cache in caches)
        assert torch.equal(written.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_batch(dtype, dim, seed):
    pattern = P.conv(150, (3, 12), kernel=5)
    prompts, candidates, start = 2, 20, 30
    q, k, v = make(pattern, prompts, candidates, 2, dim, dtype, start)
    together = decode(pattern, q, k, v, prompts, start, steps=2, seed=1)
    assert torch.equal(decode(pattern, q, k, v, prompts, start, steps=2, seed=2), together)
    for index in (0, 7, 8, 19, 20, 37):
        alone = [x[index : index + 1] for x in (q, k, v)]
        assert torch.equal(decode(pattern, *alone, 1, start, steps=2)[0], together[index])
    one_prompt = [x[candidates:] for x in (q, k, v)]
    assert torch.equal(decode(pattern, *one_prompt, 1, start, steps=2), together[candidates:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeating_a_step_changes_nothing(dtype, seed):
    pattern = P.row(4, (3, 3))
    q, k, v = make(pattern, 1, 6, 2, 16, dtype)
    expected = decode(pattern, q, k, v, 1)
    cache = new_cache(pattern, k, v, 1)
    for step in range(9):
        for _ in range(2):
            assert torch.equal(attend(*(x[:, :, 4 + step] for x in (q, k, v)), cache), expected[:, :, step])
        cache.advance()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_text_that_is_not_seen_may_be_nan(dtype, seed):
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    mask[10:, 3:7] = False
    pattern = P.from_mask(mask, text_len=10)
    q, k, v = make(pattern, 1, 5, 2, 32, dtype)
    expected = decode(pattern, q, k, v, 1)
    k[:, :, 3:7] = v[:, :, 3:7] = float("nan")
    assert torch.equal(decode(pattern, q, k, v, 1), expected)


def test_what_is_written(seed):
    """The new key and value in their slot, and nothing else."""
    pattern = P.row(5, (2, 4))
    q, k, v = make(pattern, 2, 3, 2, 24, torch.bfloat16)
    cache = new_cache(pattern, k, v, 2)
    layer = cache._layers[0]
    for storage in (layer.image_k, layer.image_v):
        storage.fill_(7.0)
    attend(*(x[:, :, 5] for x in (q, k, v)), cache)
    slot = int(layer.schedule[16])
    for storage, x in ((layer.image_k, k), (layer.image_v, v)):
        assert torch.equal(storage[:, :, slot], x[:, :, 5])
        storage[:, :, slot] = 7.0
        assert bool((storage == 7.0).all())
    assert emulated.counts()["launches"] == 1


@pytest.mark.parametrize("step", [6, 2**40, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_outside_the_image_touches_nothing(dtype, step, seed):
    pattern = P.row(2, (2, 3))
    q, k, v = make(pattern, 1, 2, 1, 8, dtype)
    cache = new_cache(pattern, k, v, 1)
    cache.step.fill_(step)
    layer = cache._layers[0]
    layer.image_k.fill_(7.0), layer.image_v.fill_(7.0)
    assert bool(attend(q[:, :, 2], k[:, :, 2], v[:, :, 2], cache).isnan().all())
    assert bool((layer.image_k == 7.0).all()) and bool((layer.image_v == 7.0).all())
