"""Stage test: every operation against `reference` in float64 and by the accuracy rule of the tests, on the GPU. The
functions are plain, so that they run where pytest is missing; tests/test_gpu_checks.py collects the same list.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from dataclasses import dataclass

import torch

import dalle_kernels as dk
from accuracy import assert_accurate, mostly
from dalle_kernels.philox import gumbel, gumbel_noise, random_bits
from patterns_for_tests import NAMES, every_pattern

P = dk.AttentionPattern
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("bhnd", "bnhd", "qkv", "offset")


@dataclass(frozen=True)
class Place:
    """Where a check runs and which backend it asks."""

    device: str
    backend: str

    def randn(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, device=self.device).to(dtype)


def items(setting):
    for backend in setting.backends():
        for name, check in cases(Place(setting.device, backend), setting.tiny):
            yield f"{backend}: {name}", lambda check=check: seeded(check)


def seeded(check):
    """Runs a check on fresh random numbers; DALLE_TEST_SEED repeats a failure."""
    seed = int(os.environ.get("DALLE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    torch.manual_seed(seed)
    try:
        check()
    except Exception:
        print(f"DALLE_TEST_SEED={seed}")
        raise
    return [{"seed": seed}]


def cases(place: Place, tiny: bool) -> list:
    """(name, function) of all checks, the most telling first."""
    paper = (4, (4, 4)) if tiny else (256, (32, 32))
    listed = {"attention": [], "gumbel": [], "sample": [], "decode": []}

    def add(name, check, *args, **options):
        listed[name.split()[0]].append((name, lambda: mostly(lambda: check(place, *args, **options))))

    for pattern in ("row", "column", "conv-wrap"):
        for dtype in DTYPES:
            add(f"attention {pattern} {dtype}, the paper's size", attention, pattern, dtype, 64, *paper)
    for name in NAMES:
        for dtype in DTYPES:
            add(f"attention {name} {dtype}", attention, name, dtype, 64, 19, (9, 11))
    for dim in (3, 31, 32, 33, 80, 127, 128):
        for dtype in DTYPES:
            add(f"attention row {dtype} dim {dim}", attention, "row", dtype, dim, 5, (7, 9))
    for layout in LAYOUTS:
        for dtype in DTYPES:
            add(f"attention strides {layout} {dtype}", attention, "conv-clip", dtype, 40, 33, (5, 8), layout=layout)
    for n in (1, 19, 20, 63, 117):
        add(f"attention shorter, {n} tokens", attention, "column", "bfloat16", 64, 19, (9, 11), n=n)
    for factor in (5.0, 40.0):
        for dtype in DTYPES:
            add(f"attention logits times {factor:g} {dtype}", attention, "row", dtype, 64, 32, (8, 8), factor=factor)
    for name in NAMES:
        add(f"attention hidden keys {name}", attention_hidden, name)
    for dtype in DTYPES:
        add(f"attention bits and batch {dtype}", attention_bits, dtype, *((4, (3, 4)) if tiny else (256, (24, 24))))
        add(f"attention graph {dtype}", attention_graph, dtype)
    for dtype in DTYPES:
        for hard in (False, True):
            kind = f"{'hard' if hard else 'soft'} {dtype}"
            add(f"gumbel {kind}, dim 1", gumbel_softmax, dtype, hard, (16, 65, 16, 8), 1)
            add(f"gumbel {kind}, last dim", gumbel_softmax, dtype, hard, (500, 130), 1)
            add(f"gumbel {kind}, odd", gumbel_softmax, dtype, hard, (8, 50, 17, 15), 1)
            if not tiny:
                add(f"gumbel {kind}, the paper's size", gumbel_softmax, dtype, hard, (2, 8192, 32, 32), 1)
        add(f"gumbel large logits {dtype}", gumbel_softmax, dtype, False, (40, 300, 7), 1, scale=30.0)
        add(f"gumbel strides {dtype}", gumbel_softmax, dtype, False, (40, 60, 9), 1, transposed=True)
        add(f"gumbel bits and rows {dtype}", gumbel_bits, dtype)
        add(f"gumbel graph {dtype}", gumbel_graph, dtype)
        for rows, vocabulary in ((5, 300), (3, 1), (64, 257), (16, 8192)):
            add(f"sample [{rows}, {vocabulary}] {dtype}", sample, dtype, rows, vocabulary)
        add(f"sample bits and batch {dtype}", sample_bits, dtype)
    add("sample graph", sample_graph)
    for name in NAMES:
        for dtype in DTYPES:
            for candidates, start in ((3, 0), (9, 13)):
                what = f"decode {name} {dtype}, {candidates} candidates from {start}"
                add(what, decode, name, dtype, candidates, start, 48, 19, (5, 7))
    for dim in (1, 33, 64, 128):
        add(f"decode dim {dim}", decode, "row", "bfloat16", 5, 0, dim, 130, (2, 5))
    for factor in (5.0, 40.0):
        add(f"decode logits times {factor:g}", decode, "conv-wrap", "float16", 9, 0, 64, 140, (3, 5), factor=factor)
    for dtype in DTYPES:
        add(f"decode bits and batch {dtype}", decode_bits, dtype)
        add(f"decode graph {dtype}", decode_graph, dtype)
    if not tiny:
        for check in (attention_beyond_32_bits, gumbel_beyond_32_bits, sample_beyond_32_bits, decode_beyond_32_bits):
            add(check.__name__.replace("_", " "), check)
    in_turn = itertools.zip_longest(*listed.values())  # one operation's crash must not keep the others from running
    return [case for cases in in_turn for case in cases if case is not None]


# -- sparse_attention


def plain_attention(q, k, v, mask, scale):
    """The yardstick: softmax(q kT * scale, masked) v with matmuls in the inputs' dtype; returns (out, lse)."""
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def with_gradients(function, tensors, grad):
    """Outputs (out, lse) and input gradients of function(q, k, v)."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def attend(place, pattern):
    return lambda q, k, v: dk.sparse_attention(q, k, v, pattern, return_lse=True, backend=place.backend)


def attention(place, name, dtype, dim, text, grid, n=None, layout="bhnd", factor=1.0):
    """Forward, lse and gradients. At least 16 (batch, head) pairs: the largest error of one is chance, that of many a
    property. Small head dims have a tolerance, as in the other tests."""
    pattern = every_pattern(text, grid)[name]
    n = n or pattern.seq_len
    batch = max(8, 2**17 // (2 * n * dim))
    q, k, v = make(place, layout, batch, 2, n, dim, DTYPES[dtype])
    q, grad = q * factor, place.randn(batch, 2, n, dim, dtype=DTYPES[dtype])
    mask, scale = pattern.dense()[:n, :n].to(place.device), dim**-0.5
    got = with_gradients(attend(place, pattern), (q, k, v), grad)
    wide = [x.double() for x in (q, k, v)]
    exact = with_gradients(
        lambda q, k, v: dk.sparse_attention(q, k, v, pattern, return_lse=True, backend="reference"), wide, grad
    )
    exact[1] = plain_attention(*wide, mask, scale)[1]  # the reference's lse is float32
    plain = with_gradients(lambda *x: plain_attention(*x, mask, scale), (q, k, v), grad)
    plain[1] = plain[1].float()
    for what, actual, e, p in zip(("out", "lse", "dq", "dk", "dv"), got, exact, plain):
        if dim < 16 and dtype == "float32":
            torch.testing.assert_close(actual.double(), e, rtol=1e-5, atol=1e-5)
        else:
            assert_accurate(actual, e, p, f"{place.backend} sparse_attention {what} {dtype}")


def make(place, layout, batch, heads, n, dim, dtype):
    """q, k, v [batch, heads, n, dim] in memory of several kinds."""
    if layout == "bhnd":
        return place.randn(3, batch, heads, n, dim, dtype=dtype).unbind(0)
    if layout == "bnhd":
        return place.randn(3, batch, n, heads, dim, dtype=dtype).transpose(2, 3).unbind(0)
    if layout == "qkv":  # one fused projection, split by views
        return place.randn(batch, n, 3, heads, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    storage = torch.full((3, batch, heads, n + 2, dim + 3), torch.nan, dtype=dtype, device=place.device)
    views = storage[..., 1:-1, 2:-1]  # NaN all around the view
    views.copy_(torch.randn(views.shape))
    return views.unbind(0)


def attention_hidden(place, name):
    """Whatever finite values lie at a key, queries that may not see it give the same bits, forward and backward."""
    pattern = every_pattern(21, (5, 9))[name]
    n = pattern.seq_len
    q, k, v, grad = place.randn(4, 1, 2, n, 48, dtype=torch.bfloat16)
    hidden = int(torch.randint(1, n - 1, ()))
    blind = ~pattern.dense()[:, hidden].to(place.device)
    grad = grad * blind[:, None]  # gradients of queries that see the key would rightly change

    def outputs(k, v):
        out, _, grad_q, *_ = with_gradients(attend(place, pattern), (q, k, v), grad)
        return out[:, :, blind], grad_q[:, :, blind]

    expected = outputs(k, v)
    k, v = k.clone(), v.clone()
    k[:, :, hidden], v[:, :, hidden] = 1e30, -1e30
    same(outputs(k, v), expected)


def attention_bits(place, dtype, text, grid):
    """The bits of a (batch, head) do not depend on the others, nor on the run."""
    pattern = P.conv(text, grid, kernel=5)
    tensors = place.randn(4, 7, 3, pattern.seq_len, 64, dtype=DTYPES[dtype])

    def outputs(part):
        q, k, v, grad = (x[part] for x in tensors)
        return with_gradients(attend(place, pattern), (q, k, v), grad)

    whole = outputs(slice(None))
    same(outputs(slice(None)), whole)
    same(outputs(slice(4, 5)), [x[4:5] for x in whole])
    same(outputs((slice(None), slice(1, 2))), [x[:, 1:2] for x in whole])


def attention_graph(place, dtype):
    """Captured once, forward and backward, and replayed with other inputs."""
    pattern = P.row(40, (9, 11))
    q, k, v, grad = place.randn(4, 2, 3, pattern.seq_len, 64, dtype=DTYPES[dtype])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def step():
        out, lse = attend(place, pattern)(*leaves)
        return [out.detach(), lse, *torch.autograd.grad(out, leaves, grad)]

    replay = captured(place, step)
    for _ in range(3):
        with torch.no_grad():
            for x in (*leaves, grad):
                x.copy_(place.randn(*x.shape))
        same(replay(), step())


def attention_beyond_32_bits(place):
    """More than 2^31 numbers in a tensor."""
    pattern = P.row(256, (32, 32))
    need_memory(place, 60)
    batch = 2**31 // (16 * pattern.seq_len * 64) + 2
    make = dict(dtype=torch.bfloat16, device=place.device)
    q, k, v, grad = (torch.randn(batch, 16, pattern.seq_len, 64, **make) for _ in range(4))
    out, lse, *grads = with_gradients(attend(place, pattern), (q, k, v), grad)
    last = with_gradients(attend(place, pattern), (q[-1:], k[-1:], v[-1:]), grad[-1:])
    same([x[-1:] for x in (out, lse, *grads)], last)


# -- gumbel_softmax


def plain_gumbel_softmax(x, seed, tau, dim):
    """The yardstick, wholly in x's dtype but for the logarithms of the noise: (y, kl)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    log_p = x.to(wide).log_softmax(dim)
    noisy = x + gumbel_noise(x.shape, seed, wide).to(x.dtype)
    return (noisy / tau).softmax(dim), (log_p.exp() * (log_p + math.log(x.shape[dim]))).sum(dim)


def relax(x, seed, tau, hard, dim, backend):
    return dk.gumbel_softmax(x, tau, hard, dim=dim, seed=seed, return_kl=True, backend=backend)


def relaxed(function, x, grad_y, grad_kl):
    """y, kl and the gradient of function(x) -> (y, kl)."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y, kl = function(x)
    torch.autograd.backward([y, kl], [grad_y.to(y.dtype), grad_kl.to(kl.dtype)])
    return y.detach(), kl.detach(), x.grad


def random_seed(place, *shape):
    return torch.randint(-(2**63), 2**63 - 1, shape, device=place.device)


def gumbel_softmax(place, dtype, hard, shape, dim, scale=2.0, transposed=False):
    x = (place.randn(*shape) * scale).to(DTYPES[dtype])
    if transposed:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    seed, grad_y, grad_kl = random_seed(place), place.randn(*shape, dtype=x.dtype), place.randn(*x.sum(dim).shape)
    for tau in (1 / 16, 1.0, 5.0):
        ours = relaxed(lambda x, t=tau: relax(x, seed, t, hard, dim, place.backend), x, grad_y, grad_kl)
        # The soft y has the gradient of the hard one too.
        exact = relaxed(lambda x, t=tau: relax(x, seed, t, False, dim, "reference"), x.double(), grad_y, grad_kl)
        plain = relaxed(lambda x, t=tau: plain_gumbel_softmax(x, seed, t, dim), x, grad_y, grad_kl)
        for what, actual, e, p in zip(("y", "kl", "gradient"), ours, exact, plain):
            if what == "y" and hard:
                assert_argmax(actual, x, seed, dim)
            else:
                assert_accurate(actual, e, p, f"{place.backend} gumbel_softmax {what} {dtype}")


def assert_argmax(y, x, seed, dim):
    """y is an exact one-hot of the largest noisy logit (of one of two that float32 cannot tell apart)."""
    noisy = x.double() + gumbel_noise(x.shape, seed, torch.float64)
    assert ((y == 0) | (y == 1)).all() and (y.sum(dim) == 1).all()
    short = noisy.amax(dim) - (noisy * y).sum(dim)
    assert short.max() < 1e-6 * noisy.abs().max(), f"a value {short.max():.3g} below the largest was taken"


def gumbel_bits(place, dtype):
    """The bits of a picture do not depend on how many there are, nor on the run."""
    x, seed = place.randn(5, 300, 6, 7, dtype=DTYPES[dtype]), random_seed(place)
    whole = relax(x, seed, 0.7, False, 1, place.backend)
    same(relax(x, seed, 0.7, False, 1, place.backend), whole)
    same(relax(x[:1], seed, 0.7, False, 1, place.backend), [part[:1] for part in whole])


def gumbel_graph(place, dtype):
    x, grad = place.randn(2, 3, 100, 50, dtype=DTYPES[dtype])
    x, seed = x.requires_grad_(), random_seed(place)

    def step():
        y, kl = relax(x, seed, 0.7, False, 1, place.backend)
        return [y.detach(), kl.detach(), torch.autograd.grad((y, kl), x, (grad, torch.ones_like(kl)))[0]]

    replay = captured(place, step)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(place.randn(*x.shape))
            seed.copy_(random_seed(place))
        same(replay(), step())


def gumbel_beyond_32_bits(place):
    """Positions beyond 2^31: the last picture against the same in plain PyTorch."""
    need_memory(place, 24)
    shape = 2**31 // (8192 * 64 * 64) + 2, 8192, 64, 64
    x = torch.randn(shape, dtype=torch.bfloat16, device=place.device)
    seed, size = random_seed(place), math.prod(shape[1:])
    y = dk.gumbel_softmax(x, 0.7, dim=1, seed=seed, backend=place.backend)[-1]
    index = torch.arange(x.numel() - size, x.numel(), device=place.device)
    noise = gumbel(random_bits(seed, torch.zeros_like(seed), index)).view_as(x[-1])
    expected = ((x[-1].float() + noise) / 0.7).softmax(0)
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=1e-6)


# -- sample_tokens

FILTERS = ((1.0, None, None), (0.5, 40, None), (1.3, None, 0.9), (1.0, 20, 0.5))


def sample(place, dtype, rows, vocabulary):
    """The tokens of the reference in float64; another only if float32 cannot tell them apart, or if top_p is met
    within rounding."""
    logits = (place.randn(rows, vocabulary) * 3).to(DTYPES[dtype])
    seed, offset = random_seed(place, rows), random_seed(place, rows)

    index, wide = torch.arange(vocabulary, device=place.device), logits.double()
    noise = gumbel(random_bits(seed[:, None], offset[:, None], index), torch.float64)
    for temperature, top_k, top_p in FILTERS:
        scores = wide / temperature + noise
        options = dict(temperature=temperature, top_k=top_k, seed=seed, offset=offset)
        near = [None] if top_p is None else [top_p * (1 - 1e-6), top_p, top_p * (1 + 1e-6)]
        drawn = [dk.sample_tokens(wide, **options, top_p=p, backend="reference") for p in near]
        best = scores.gather(1, torch.stack(drawn, 1))
        got = dk.sample_tokens(logits, **options, top_p=top_p, backend=place.backend)
        ours = scores.gather(1, got[:, None])
        close = (ours - best).abs().amin(1) <= 2e-6 * scores.abs().amax(1)
        assert close.all(), f"{(~close).sum()} of {rows} tokens differ"


def sample_bits(place, dtype):
    logits = place.randn(40, 999, dtype=DTYPES[dtype])
    seed, offset = random_seed(place, 40), random_seed(place, 40)

    def draw(part):
        options = dict(top_k=100, top_p=0.9, backend=place.backend)
        return dk.sample_tokens(logits[part], seed=seed[part], offset=offset[part], **options)

    whole = draw(slice(None))
    assert torch.equal(torch.cat([draw(slice(i, i + 1)) for i in range(40)]), whole)


def sample_graph(place):
    logits, seed, offset = place.randn(9, 500), random_seed(place, 9), random_seed(place, 9)

    def step():
        return [dk.sample_tokens(logits, top_k=50, top_p=0.9, seed=seed, offset=offset, backend=place.backend)]

    replay = captured(place, step)
    for _ in range(3):
        logits.copy_(place.randn(9, 500))
        seed.copy_(random_seed(place, 9))
        offset.add_(1)
        same(replay(), step())


def sample_beyond_32_bits(place):
    need_memory(place, 12)
    rows = 2**31 // 16384 + 3
    logits, seed = torch.randn(rows, 16384, dtype=torch.bfloat16, device=place.device), random_seed(place, rows)
    last = slice(rows - 2, rows)
    whole = dk.sample_tokens(logits, seed=seed, top_k=100, backend=place.backend)
    assert torch.equal(whole[last], dk.sample_tokens(logits[last], seed=seed[last], top_k=100, backend=place.backend))


# -- decode_attention


def prefixed(place, pattern, prompts, candidates, heads, dim, dtype, start=0, factor=1.0):
    """q, k, v [P * C, H, N, D]; what precedes the first decoded token is the same for all candidates of a prompt."""
    q, k, v = (place.randn(prompts, candidates, heads, pattern.seq_len, dim, dtype=dtype) for _ in range(3))
    given = pattern.text_len + start
    for x in (k, v):
        x[..., :given, :] = x[:, :1, :, :given].clone()
    return [x.flatten(0, 1) for x in (q * factor, k, v)]


def new_cache(pattern, k, v, prompts, start=0):
    """A cache with its prefix written and NaN in every slot that was not."""
    sequences, heads, _, dim = k.shape
    candidates = sequences // prompts
    sizes = dict(prompts=prompts, candidates=candidates, heads=heads, head_dim=dim, dtype=k.dtype, device=k.device)
    cache = dk.DecodeCache([pattern], **sizes, start=start)
    for storage in (cache._layers[0].image_k, cache._layers[0].image_v):
        storage.fill_(torch.nan)
    given = pattern.text_len + start
    cache.prefill(0, k[::candidates, :, :given], v[::candidates, :, :given])
    return cache


def decoded(place, pattern, q, k, v, prompts, start=0):
    """The image's rows of the output, one step at a time: [P * C, H, steps, D]."""
    cache, out = new_cache(pattern, k, v, prompts, start), []
    with dk.use_backend(place.backend):
        for token in range(pattern.text_len + start, pattern.seq_len):
            out.append(dk.decode_attention(q[:, :, token], k[:, :, token], v[:, :, token], cache, 0))
            cache.advance()
    return torch.stack(out, 2)


def decode(place, name, dtype, candidates, start, dim, text, grid, factor=1.0):
    pattern, prompts = every_pattern(text, grid)[name], 2
    tensors = prefixed(place, pattern, prompts, candidates, 2, dim, DTYPES[dtype], start, factor)
    rows, mask = slice(text + start, None), pattern.dense().to(place.device)
    exact = dk.sparse_attention(*(x.double() for x in tensors), pattern, backend="reference")
    plain = plain_attention(*tensors, mask, dim**-0.5)[0]
    out, what = decoded(place, pattern, *tensors, prompts, start), f"{place.backend} decode_attention out {dtype}"
    assert_accurate(out, exact[:, :, rows], plain[:, :, rows], what)


def decode_bits(place, dtype):
    """The bits of a sequence do not depend on the other candidates and prompts, nor on the run."""
    pattern = P.conv(33, (3, 5), kernel=5)
    tensors = prefixed(place, pattern, 3, 40, 2, 64, DTYPES[dtype])
    whole = decoded(place, pattern, *tensors, 3)
    assert torch.equal(decoded(place, pattern, *tensors, 3), whole)
    for index in (0, 39, 40, 119):
        alone = [x[index : index + 1] for x in tensors]
        assert torch.equal(decoded(place, pattern, *alone, 1)[0], whole[index])
    assert torch.equal(decoded(place, pattern, *(x[40:80] for x in tensors), 1), whole[40:80])


def decode_graph(place, dtype):
    """A step with its advance, captured once and replayed for the rest of the picture."""
    pattern = P.column(12, (4, 5))
    q, k, v = prefixed(place, pattern, 2, 9, 2, 64, DTYPES[dtype])
    expected = decoded(place, pattern, q, k, v, 2)
    cache = new_cache(pattern, k, v, 2)
    new = [x[:, :, 12].clone() for x in (q, k, v)]

    def step():
        with dk.use_backend(place.backend):
            out = dk.decode_attention(*new, cache, 0)
        cache.advance()
        return [out]

    replay = captured(place, step)
    cache.reset()
    for number in range(20):
        for target, source in zip(new, (q, k, v)):
            target.copy_(source[:, :, 12 + number])
        same(replay(), [expected[:, :, number]])


def decode_beyond_32_bits(place):
    """A cache of more than 2^31 numbers: the last candidate as if it were alone."""
    need_memory(place, 24)
    pattern, heads, dim = P.causal(8, (32, 32)), 16, 64
    candidates = 2**31 // (heads * dim * 1024) + 3
    new = torch.randn(3, candidates, heads, dim, dtype=torch.bfloat16, device=place.device)
    prefix = torch.randn(2, 1, heads, 8, dim, dtype=torch.bfloat16, device=place.device)

    def run(part):
        count = part.stop - part.start
        cache = dk.DecodeCache(
            [pattern], prompts=1, candidates=count, heads=heads, head_dim=dim, dtype=torch.bfloat16, device=place.device
        )
        cache.prefill(0, *prefix)
        with dk.use_backend(place.backend):
            for _ in range(3):
                out = dk.decode_attention(*(x[part] for x in new), cache, 0)
                cache.advance()
        return out

    last = slice(candidates - 1, candidates)
    assert torch.equal(run(slice(0, candidates))[last], run(last))


# -- helpers


def same(actual, expected):
    """The same bits."""
    for number, (a, b) in enumerate(zip(actual, expected)):
        assert torch.equal(a, b), f"output {number} differs by up to {(a.double() - b.double()).abs().max():.3g}"


def captured(place, step):
    """A function that replays `step`, captured as a CUDA graph, and returns its outputs; `step` itself on a CPU."""
    if torch.device(place.device).type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # plans are compiled and uploaded here
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outputs = step()

    def replay():
        graph.replay()
        return outputs

    return replay


def need_memory(place, gigabytes):
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        raise MemoryError(f"needs {gigabytes} GB of device memory, and {free:.0f} are free")
