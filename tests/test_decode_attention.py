"""decode_attention and its cache: storage, steps and layers, torch.compile, and invalid arguments. test_conformance.py
has the requirements on every backend.
"""

import pytest
import torch

import dalle_kernels as dk
from conformance import Target
from conformance.decode_attention import decode, make, new_cache, plain_attention
from patterns_for_tests import every_pattern

CPU, REFERENCE = Target("cpu"), Target("reference")
P = dk.AttentionPattern


def test_reference_is_exact_in_float64(seed):
    pattern = every_pattern(5, (4, 5))["conv-clip"]
    q, k, v = make(CPU, pattern, 2, 2, 1, 7, torch.float64)
    exact = plain_attention(q, k, v, pattern.dense(), 7**-0.5)[:, :, 5:]
    torch.testing.assert_close(decode(REFERENCE, pattern, q, k, v, 2), exact, rtol=0, atol=1e-12)


def test_bits_do_not_depend_on_threads(seed):
    pattern = P.row(150, (2, 9))
    q, k, v = make(CPU, pattern, 1, 24, 2, 64, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(decode(CPU, pattern, q, k, v, 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_more_steps_than_the_image_has(seed):
    pattern = P.row(2, (2, 3))
    q, k, v = make(CPU, pattern, 1, 2, 1, 8, torch.float32)
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
    _, k, v = make(CPU, pattern, 1, 2, 1, 8, torch.float32, start=2)
    cache = new_cache(pattern, k, v, 1, start=2)
    cache.reset()
    with pytest.raises(ValueError, match=r"call cache\.prefill"):
        dk.decode_attention(*torch.zeros(3, 2, 1, 8), cache, 0)


def test_storage_and_addresses(seed):
    """Text is stored once per prompt, images in R slots per sequence, and addresses are stable."""
    pattern = P.row(5, (4, 6))
    q, k, v = make(CPU, pattern, 2, 3, 2, 8, torch.float32)
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
    data = [make(CPU, pattern, 1, 2, 2, 16, torch.float32) for pattern in patterns]
    cache = dk.DecodeCache(patterns, prompts=1, candidates=2, heads=2, head_dim=16, dtype=torch.float32)
    expected = [decode(CPU, pattern, *x, 1) for pattern, x in zip(patterns, data)]
    for layer, (_, k, v) in enumerate(data):
        cache.prefill(layer, k[:1, :, :3], v[:1, :, :3])
    for step in range(12):
        for layer, x in enumerate(data):
            out = dk.decode_attention(*(y[:, :, 3 + step] for y in x), cache, layer)
            assert torch.equal(out, expected[layer][:, :, step])
        cache.advance()


def test_text_lengths_can_change_between_steps(seed):
    """The lengths of the moment count; text that exists for all prompts has the bits of no lengths at all."""
    pattern = P.row(70, (2, 3))
    q, k, v = make(CPU, pattern, 2, 6, 2, 32, torch.float32)
    all_text, some_text = (decode(CPU, pattern, q, k, v, 2, lengths=lengths) for lengths in (None, [70, 9]))
    cache = new_cache(pattern, k, v, 2, lengths=[70, 70])
    for number in range(6):
        out = dk.decode_attention(*(x[:, :, 70 + number] for x in (q, k, v)), cache, 0)
        assert torch.equal(out, (all_text if number < 3 else some_text)[:, :, number])
        cache.text_lengths[1] = 70 if number < 2 else 9
        cache.advance()
    assert not torch.equal(all_text, some_text)


# -- the registered operations


def test_opcheck(seed):
    pattern = P.conv(5, (3, 4), kernel=3)
    q, k, v = make(CPU, pattern, 2, 3, 2, 40, torch.float32)
    cache = new_cache(pattern, k, v, 2, start=2)
    layer = cache._layers[0]
    step = [x[:, :, 7] for x in (q, k, v)]
    storage = [layer.prefix_k, layer.prefix_v, layer.image_k.zero_(), layer.image_v.zero_()]
    arguments = *step, *storage, layer.schedule, cache.step, 0.2
    for options in ((), (torch.tensor([5, 2]),)):
        torch.library.opcheck(torch.ops.dalle_kernels.decode_attention.default, (*arguments, *options))
    torch.library.opcheck(torch.ops.dalle_kernels.decode_advance.default, (cache.step, 12))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_step_compiles_into_one_graph(mode, seed):
    pattern = P.row(6, (3, 4))
    q, k, v = make(CPU, pattern, 2, 5, 2, 32, torch.float32)
    expected = decode(CPU, pattern, q, k, v, 2)
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
        (["row"], {}, TypeError, "must be AttentionPatterns; got str .*from_mask .*or FlexAttention"),
        (
            [P.row(3, (2, 2)), P.row(2, (2, 2))],
            {},
            ValueError,
            r"got the pairs \[\(2, 6\), \(3, 7\)\]",
        ),
        ([P.row(3, (2, 2))], {"candidates": 0}, ValueError, "candidates must be at least 1; got 0"),
        ([P.row(3, (2, 2))], {"start": 4}, ValueError, r"start must lie in \[0, 3\] .* got 4"),
        ([P.row(3, (2, 2))], {"start": -1}, ValueError, "got -1"),
        ([P.row(3, (2, 2))], {"device": "gpu"}, ValueError, "device must be one that this PyTorch can use; got 'gpu'"),
        ([P.row(3, (2, 2))], {"device": "mps"}, ValueError, "got 'mps': Could not run 'aten::[^ ]*' with [^.]*$"),
        ([P.row(3, (2, 2))], {"dtype": torch.float8_e5m2}, TypeError, "or float64; got torch.float8_e5m2"),
        ([P.row(3, (2, 2))], {"dtype": torch.int64}, TypeError, "float16 or float64; got torch.int64"),
        ([P.row(3, (2, 2))], {"text_lengths": [3, 3]}, ValueError, r"must be an int64 tensor \[2\]; got list"),
        ([P.row(3, (2, 2))], {"text_lengths": torch.ones(3)}, ValueError, r"\[2\] on cpu; got torch.float32 \[3\]"),
        ([P.row(3, (2, 2))], {"text_lengths": torch.tensor([0, 4])}, ValueError, r"in \[0, 3\], .* got \[0, 4\]"),
    ],
)
def test_a_cache_that_cannot_be(patterns, change, error, message):
    with pytest.raises(error, match=message):
        dk.DecodeCache(patterns, **{**SIZES, **change})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_cache_on_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match=r"device must be one that this PyTorch can use; got 'cuda': [^.\n]*$"):
        dk.DecodeCache([P.row(3, (2, 2))], **SIZES, device="cuda")


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
        ({"q": torch.zeros(6, 2, 8, requires_grad=True)}, NotImplementedError, "has no derivative"),
        ({"cache": dk.DecodeCache([P.row(3, (2, 2))], **SIZES)}, ValueError, r"layer 0 holds 0 of the .* 3 prefix"),
    ],
)
def test_a_step_that_cannot_be(change, error, message):
    arguments = dict(zip("qkv", torch.zeros(3, 6, 2, 8)), cache=written_cache(), layer=0)
    with pytest.raises(error, match=message):
        dk.decode_attention(**{**arguments, **change})


def test_a_prefix_of_another_shape():
    with pytest.raises(ValueError, match=r"at most 3 tokens, as layer 0 has 0 of the text_len \+ start = 3 .* got 4"):
        written_cache().prefill(0, *torch.zeros(2, 2, 2, 4, 8))


def test_a_wide_head_falls_back_and_says_why():
    cache = dk.DecodeCache([P.row(0, (1, 1))], prompts=1, candidates=1, heads=1, head_dim=200, dtype=torch.float32)
    x = torch.randn(3, 1, 1, 200)
    assert torch.equal(dk.decode_attention(*x, cache, 0), x[2])
    with dk.use_backend("cpu"), pytest.raises(NotImplementedError, match="head dims up to 128, not 200"):
        dk.decode_attention(*x, cache, 0)
