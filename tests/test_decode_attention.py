"""decode_attention step by step against full attention in float64, for every pattern, dtype and batch."""


import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_kernels as dk
from accuracy import assert_accurate, mostly
from patterns_for_tests import NAMES, every_pattern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
P = dk.AttentionPattern


def plain_attention(q, k, v, mask):
    """The yardstick: softmax(q kT * scale, masked) v with matmuls in the inputs' dtype."""
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def make(pattern, prompts, candidates, heads, dim, dtype, start=0, factor=1.0):
    """q, k, v [P * C, H, N, D]; what precedes the first decoded token is the same for all candidates of a prompt."""
    q, k, v = (torch.randn(prompts, candidates, heads, pattern.seq_len, dim).to(dtype) for _ in range(3))
    given_tokens = pattern.text_len + start
    for x in (k, v):
        x[..., :given_tokens, :] = x[:, :1, :, :given_tokens]
    return [x.flatten(0, 1) for x in (q * factor, k, v)]


def new_cache(pattern, k, v, prompts, start=0, layers=1):
    """A cache with its prefix written and NaN in every slot that was not."""
    sequences, heads, _, dim = k.shape
    candidates = sequences // prompts
    sizes = dict(prompts=prompts, candidates=candidates, heads=heads, head_dim=dim, dtype=k.dtype)
    cache = dk.DecodeCache([pattern] * layers, **sizes, start=start)
    given_tokens = pattern.text_len + start
    for index, layer in enumerate(cache._layers):
        layer.image_k.fill_(float("nan"))
        layer.image_v.fill_(float("nan"))
        cache.prefill(index, k[::candidates, :, :given_tokens], v[::candidates, :, :given_tokens])
    return cache


def decode(pattern, q, k, v, prompts, start=0, backend="cpu", steps=None):
    """The image's rows of the output, one step at a time: [P * C, H, steps, D]."""
    first = pattern.text_len + start
    last = pattern.seq_len if steps is None else first + steps
    cache, out = new_cache(pattern, k, v, prompts, start), []
    with dk.use_backend(backend):
        for token in range(first, last):
            out.append(dk.decode_attention(q[:, :, token], k[:, :, token], v[:, :, token], cache, 0))
            cache.advance()
    return torch.stack(out, 2)


def check(pattern, q, k, v, prompts, start, backend):
    rows = slice(pattern.text_len + start, None)
    mask = pattern.dense()
    exact = plain_attention(q.double(), k.double(), v.double(), mask)[:, :, rows]
    plain = plain_attention(q, k, v, mask)[:, :, rows]
    out = decode(pattern, q, k, v, prompts, start, backend)
    assert_accurate(out, exact, plain, f"{backend} decode_attention out {q.dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equals_full_attention(backend, name, dtype, seed):
    pattern = every_pattern(19, (6, 7))[name]
    for start in (0, 13):
        check(pattern, *make(pattern, 2, 3, 2, 48, dtype, start), 2, start, backend)


def test_reference_is_exact_in_float64(seed):
    pattern = every_pattern(5, (4, 5))["conv-clip"]
    q, k, v = make(pattern, 2, 2, 1, 7, torch.float64)
    exact = plain_attention(q, k, v, pattern.dense())[:, :, 5:]
    torch.testing.assert_close(decode(pattern, q, k, v, 2, backend="reference"), exact, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    prompts=st.integers(1, 3),
    candidates=st.sampled_from([1, 2, 3, 4, 5, 31, 33]),
    dim=st.sampled_from([1, 3, 31, 32, 33, 64, 80, 127, 128]),
    text_len=st.sampled_from([0, 1, 7, 8, 9, 130, 257]),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_shape(prompts, candidates, dim, text_len, grid, name, dtype, data):
    start = data.draw(st.integers(0, grid[0] * grid[1] - 1), label="start")
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    pattern = every_pattern(text_len, grid)[name]
    numbers = prompts * candidates * dim * (grid[0] * grid[1] - start)
    heads = -(-300 // numbers)  # a largest error means little over a handful of numbers
    mostly(
        lambda: check(pattern, *make(pattern, prompts, candidates, heads, dim, dtype, start), prompts, start, "cpu")
    )


@pytest.mark.parametrize("factor", [5.0, 40.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(factor, dtype, seed):
    pattern = P.conv(140, (5, 6), kernel=3)
    for candidates in (1, 9):
        check(pattern, *make(pattern, 1, candidates, 2, 64, dtype, factor=factor), 1, 0, "cpu")


@pytest.mark.parametrize("layout", ["qkv", "heads_last", "spread"])
def test_strided_inputs(layout, seed):
    pattern = P.row(6, (3, 4))
    _, k, v = make(pattern, 2, 5, 3, 24, torch.float32)
    new = torch.randn(3, 10, 3, 24)
    if layout == "qkv":
        views = new.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    elif layout == "heads_last":
        views = new.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    else:  # no contiguous last dimension: copied
        views = torch.zeros(3, 10, 3, 48)[..., ::2].copy_(new)
    assert not views[0].is_contiguous()
    strided = dk.decode_attention(*views, new_cache(pattern, k, v, 2), 0)
    assert torch.equal(strided, dk.decode_attention(*new, new_cache(pattern, k, v, 2), 0)) and strided.is_contiguous()


@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text_len", [1, 33, 300])
def test_bits_do_not_depend_on_the_batch(text_len, dtype, dim, seed):
    pattern = P.conv(text_len, (3, 12), kernel=5)
    prompts, candidates = 3, 40
    q, k, v = make(pattern, prompts, candidates, 2, dim, dtype)
    together = decode(pattern, q, k, v, prompts, steps=20)
    for index in (0, 39, 40, 77, 119):
        alone = [x[index : index + 1] for x in (q, k, v)]
        assert torch.equal(decode(pattern, *alone, 1, steps=20)[0], together[index])
    one_prompt = [x[40:80] for x in (q, k, v)]
    assert torch.equal(decode(pattern, *one_prompt, 1, steps=20), together[40:80])


def test_bits_do_not_depend_on_threads(seed):
    pattern = P.row(150, (2, 9))
    q, k, v = make(pattern, 1, 24, 2, 64, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(decode(pattern, q, k, v, 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_repeating_a_step_changes_nothing(backend, seed):
    pattern = P.row(4, (3, 5))
    q, k, v = make(pattern, 1, 6, 2, 16, torch.float32)
    expected = decode(pattern, q, k, v, 1, backend=backend)
    cache = new_cache(pattern, k, v, 1)
    with dk.use_backend(backend):
        for step in range(15):
            for _ in range(3):
                out = dk.decode_attention(*(x[:, :, 4 + step] for x in (q, k, v)), cache, 0)
                assert torch.equal(out, expected[:, :, step])
            cache.advance()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_text_that_is_not_seen_may_be_nan(backend, seed):
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    mask[10:, 3:7] = False
    pattern = P.from_mask(mask, text_len=10)
    q, k, v = make(pattern, 1, 5, 2, 32, torch.bfloat16)
    expected = decode(pattern, q, k, v, 1, backend=backend)
    k[:, :, 3:7] = v[:, :, 3:7] = float("nan")
    assert torch.equal(decode(pattern, q, k, v, 1, backend=backend), expected)


def test_more_steps_than_the_image_has(seed):
    pattern = P.row(2, (2, 3))
    q, k, v = make(pattern, 1, 2, 1, 8, torch.float32)
    cache = new_cache(pattern, k, v, 1)
    step = [x[:, :, 2] for x in (q, k, v)]
    first = dk.decode_attention(*step, cache, 0)
    for _ in range(6):
        cache.advance()
    for beyond in (cache.advance, lambda: dk.decode_attention(*step, cache, 0)):
        with pytest.raises(ValueError, match=r"all 6 tokens of the image have been decoded; call cache.reset\(\)"):
            beyond()
    cache.reset()
    assert torch.equal(dk.decode_attention(*step, cache, 0), first)


def test_reset_asks_for_the_given_tokens_again(seed):
    pattern = P.row(2, (2, 3))
    _, k, v = make(pattern, 1, 2, 1, 8, torch.float32, start=2)
    cache = new_cache(pattern, k, v, 1, start=2)
    cache.reset()
    with pytest.raises(ValueError, match=r"call cache\.prefill"):
        dk.decode_attention(*torch.zeros(3, 2, 1, 8), cache, 0)


def test_storage_and_addresses(seed):
    """Text once per prompt, R slots per sequence, and nothing moves."""
    pattern = P.row(5, (4, 6))
    q, k, v = make(pattern, 2, 3, 2, 8, torch.float32)
    cache = new_cache(pattern, k, v, 2, layers=2)
    names = "prefix_k", "prefix_v", "image_k", "image_v"
    tensors = [cache.step, *(getattr(layer, name) for layer in cache._layers for name in names)]
    addresses = [x.data_ptr() for x in tensors]
    assert [list(x.shape) for x in tensors[1:]] == 2 * [[2, 2, 5, 8], [2, 2, 5, 8], [6, 2, 7, 8], [6, 2, 7, 8]]
    for layer in range(2):
        dk.decode_attention(q[:, :, 5], k[:, :, 5], v[:, :, 5], cache, layer)
    cache.advance()
    cache.prefill(0, k[::3, :, :5], v[::3, :, :5])
    cache.reset()
    assert [x.data_ptr() for x in tensors] == addresses and int(cache.step) == 0


def test_layers_are_separate(seed):
    patterns = [P.row(3, (3, 4)), P.column(3, (3, 4))]
    data = [make(pattern, 1, 2, 2, 16, torch.float32) for pattern in patterns]
    cache = dk.DecodeCache(patterns, prompts=1, candidates=2, heads=2, head_dim=16, dtype=torch.float32)
    expected = [decode(pattern, *x, 1) for pattern, x in zip(patterns, data)]
    for layer, (_, k, v) in enumerate(data):
        cache.prefill(layer, k[:1, :, :3], v[:1, :, :3])
    for step in range(12):
        for layer, x in enumerate(data):
            out = dk.decode_attention(*(y[:, :, 3 + step] for y in x), cache, layer)
            assert torch.equal(out, expected[layer][:, :, step])
        cache.advance()


# -- the registered operations


def test_opcheck(seed):
    pattern = P.conv(5, (3, 4), kernel=3)
    q, k, v = make(pattern, 2, 3, 2, 40, torch.float32)
    cache = new_cache(pattern, k, v, 2, start=2)
    layer = cache._layers[0]
    step = [x[:, :, 7] for x in (q, k, v)]
    storage = [layer.prefix_k, layer.prefix_v, layer.image_k.zero_(), layer.image_v.zero_()]
    arguments = *step, *storage, layer.schedule, cache.step, 0.2
    torch.library.opcheck(torch.ops.dalle_kernels.decode_attention.default, arguments)
    torch.library.opcheck(torch.ops.dalle_kernels.decode_advance.default, (cache.step, 12))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_step_compiles_into_one_graph(mode, seed):
    pattern = P.row(6, (3, 4))
    q, k, v = make(pattern, 2, 5, 2, 32, torch.float32)
    expected = decode(pattern, q, k, v, 2)
    cache = new_cache(pattern, k, v, 2, layers=2)
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    @torch.compile(fullgraph=True, backend=count)
    def step(q, k, v):
        first = dk.decode_attention(q, k, v, cache, 0)
        second = dk.decode_attention(q, k, v, cache, 1)
        cache.advance()
        return first, second

    torch._dynamo.reset()
    with mode():
        for token in range(12):
            for out in step(*(x[:, :, 6 + token].contiguous() for x in (q, k, v))):
                assert torch.equal(out, expected[:, :, token])
    assert len(graphs) == 1


def test_a_cache_made_in_inference_mode_works_outside(seed):
    with torch.inference_mode():
        cache = dk.DecodeCache([P.row(0, (2, 2))], prompts=1, candidates=1, heads=1, head_dim=4, dtype=torch.float32)
    x = torch.randn(3, 1, 1, 4)
    assert torch.equal(dk.decode_attention(*x, cache, 0), x[2])
    cache.advance()


# -- errors

SIZES = dict(prompts=2, candidates=3, heads=2, head_dim=8, dtype=torch.float32)


@pytest.mark.parametrize(
    ("patterns", "change", "error", "message"),
    [
        ([], {}, ValueError, "one pattern per layer; got none"),
        (["row"], {}, TypeError, "must be AttentionPatterns; got str"),
        (
            [P.row(3, (2, 2)), P.row(2, (2, 2))],
            {},
            ValueError,
            r"got the pairs \[\(2, 6\), \(3, 7\)\]",
        ),
        ([P.row(3, (2, 2))], {"candidates": 0}, ValueError, "candidates must be at least 1; got 0"),
        ([P.row(3, (2, 2))], {"start": 4}, ValueError, r"start must lie in \[0, 3\] .* got 4"),
        ([P.row(3, (2, 2))], {"start": -1}, ValueError, "got -1"),
        ([P.row(3, (2, 2))], {"dtype": torch.int64}, TypeError, "floating-point dtype; got torch.int64"),
    ],
)
def test_a_cache_that_cannot_be(patterns, change, error, message):
    with pytest.raises(error, match=message):
        dk.DecodeCache(patterns, **{**SIZES, **change})


def written_cache():
    cache = dk.DecodeCache([P.row(3, (2, 2))], **SIZES)
    cache.prefill(0, *torch.zeros(2, 2, 2, 3, 8))
    return cache


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layer": 1}, ValueError, r"layer must lie in \[0, 0\]; got 1"),
        ({"layer": -1}, ValueError, "got -1"),
        ({"q": torch.zeros(5, 2, 8)}, ValueError, r"q must be .* = \[6, 2, 8\]; got \[5, 2, 8\]"),
        (
            {"k": torch.zeros(6, 2, 8, dtype=torch.float16)},
            TypeError,
            "k must have the cache's dtype torch.float32",
        ),
        ({"v": torch.zeros(6, 2, 8, device="meta")}, ValueError, "v must be on the cache's device cpu; got meta"),
        ({"q": torch.zeros(6, 2, 8, requires_grad=True)}, NotImplementedError, "has no gradient"),
        ({"cache": dk.DecodeCache([P.row(3, (2, 2))], **SIZES)}, ValueError, "layer 0 has no prefix yet"),
    ],
)
def test_a_step_that_cannot_be(change, error, message):
    arguments = dict(zip("qkv", torch.zeros(3, 6, 2, 8)), cache=written_cache(), layer=0)
    with pytest.raises(error, match=message):
        dk.decode_attention(**{**arguments, **change})


def test_a_prefix_of_another_shape():
    with pytest.raises(ValueError, match=r"text_len \+ start, head_dim\] = \[2, 2, 3, 8\]; got \[2, 2, 4, 8\]"):
        written_cache().prefill(0, *torch.zeros(2, 2, 2, 4, 8))


def test_a_wide_head_falls_back_and_says_why():
    cache = dk.DecodeCache([P.row(0, (1, 1))], prompts=1, candidates=1, heads=1, head_dim=200, dtype=torch.float32)
    x = torch.randn(3, 1, 1, 200)
    assert torch.equal(dk.decode_attention(*x, cache, 0), x[2])
    with dk.use_backend("cpu"), pytest.raises(NotImplementedError, match="head dims up to 128, not 200"):
        dk.decode_attention(*x, cache, 0)


@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scale(backend, scale, seed):
    """As in sparse_attention, whatever the sign."""
    pattern = dk.AttentionPattern.conv(4, (3, 5), kernel=3)
    q, k, v = torch.randn(3, 2, 3, 19, 8)
    cache = dk.DecodeCache([pattern], prompts=2, candidates=1, heads=3, head_dim=8, dtype=torch.float32)
    cache.prefill(0, k[:, :, :4], v[:, :, :4])
    expected = dk.sparse_attention(q.double(), k.double(), v.double(), pattern, scale=scale, backend="reference")
    for token in range(4, 19):
        new = (x[:, :, token] for x in (q, k, v))
        out = dk.decode_attention(*new, cache, 0, scale=scale, backend=backend)
        torch.testing.assert_close(out.double(), expected[:, :, token], rtol=1e-5, atol=1e-6)
        cache.advance()
