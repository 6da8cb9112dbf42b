"""sample_tokens: the tokens of the float64 definition, for every filter; ties, non-finite rows, and independence of the
other rows.
"""

from __future__ import annotations

import math

import numpy as np
import torch

import dalle_kernels as dk
from dalle_kernels.philox import gumbel, random_bits
from statistics_for_tests import REJECT, frequencies_p

from .target import DTYPES, Case, Cases, Target, captured, compiled, need_memory, same

LAYOUTS = ("contiguous", "transposed", "strided", "offset")
FILTERS = ({}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.7}, {"top_k": 30, "top_p": 0.9})
EXTREMES = (
    {"top_k": 1}, {"top_k": 299}, {"top_k": 300}, {"top_k": 1000}, {"top_p": 1e-9}, {"top_p": 0.999999},
    {"top_p": 1 - 2**-53}, {"top_p": 1.0}, {"temperature": 1e-30, "top_k": 40}, {"temperature": 1e3, "top_p": 0.5},
)  # fmt: skip


def cases(target: Target) -> list[Case]:
    found = Cases(target, "sample")
    add = found.add
    for dtype in target.dtypes:
        for vocabulary in (1, 2, 3, 17, 64, 257, 2047):
            add(f"[2, {vocabulary}] {dtype}", definition, dtype, 2, vocabulary, rare=vocabulary > 257)
        add(f"extremes of filters {dtype}", definition, dtype, 2, 300, filters=EXTREMES)
        add(f"the paper's vocabulary {dtype}", definition, dtype, 2, 8192, rare=dtype != "float32")
        for layout in LAYOUTS[1:]:
            add(f"{layout} {dtype}", definition, dtype, 3, 70, layout=layout)
        add(f"broken rows {dtype}", broken_rows, dtype)
    add("a vocabulary beyond shared memory", definition, "float32", 1, 60_001, filters=({"top_k": 50, "top_p": 0.6},))
    for check in (equally_likely, greedy, one_row, empty):
        add(check.__name__.replace("_", " "), check)
    for options in ({}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 8, "top_p": 0.8}):
        add(f"frequencies {options}", frequencies, options, rare=options != {"top_k": 8, "top_p": 0.8})
    if target.kernels:
        add("graph", graph)
    return found.completed(one_graph, beyond_32_bits)


def kept(row, temperature, top_k, top_p):
    """The tokens that the filters keep, by definition; `row` is a list of floats."""
    order = sorted(range(len(row)), key=lambda token: -row[token])
    if top_k is not None:
        order = [token for token in order if row[token] >= row[order[min(top_k, len(row)) - 1]]]
    if top_p is not None and top_p < 1:
        mass = [math.exp((row[token] - row[order[0]]) / temperature) for token in order]
        enough, total = 0.0, math.fsum(mass)
        for last, m in zip(order, mass):  # noqa: B007
            enough += m
            if enough >= top_p * total:
                break
        order = [token for token in order if row[token] >= row[last]]
    return order


def noise(seed, offset, count):
    """Gumbel noise in float64."""
    words = random_bits(torch.tensor(seed), torch.tensor(offset), torch.arange(count))
    return gumbel(words, torch.float64).numpy()


def acceptable(row, seed, offset, temperature=1.0, top_k=None, top_p=None):
    """The acceptable results in float32: the best token, those within rounding of it, and the best tokens if top_p is
    perturbed within rounding.
    """
    scores = np.array(row) / temperature + noise(seed, offset, len(row))
    result = set()
    for p in (top_p,) if top_p is None or top_p == 1 else (top_p * (1 - 1e-6), top_p, min(1, top_p * (1 + 1e-6))):
        tokens = kept(row, temperature, top_k, p)
        best = max(scores[tokens])
        close = 2e-6 * max(np.abs(scores[np.isfinite(scores)]))
        result |= {token for token in tokens if scores[token] >= best - close}
    return result


def check(target, logits, options):
    """Checks that the token of every row is acceptable."""
    seeds, offsets = target.seeds(2, len(logits))
    tokens = dk.sample_tokens(logits, seed=seeds, offset=offsets, **options, backend=target.backend)
    assert tokens.dtype == torch.int64 and tokens.shape == logits.shape[:1]
    rows = zip(logits.double().tolist(), seeds.tolist(), offsets.tolist(), tokens.tolist())
    for row, seed, offset, token in rows:
        good = acceptable(row, seed, offset, **options)
        assert token in good, f"token {token}, expected one of {good}, with {options}"


def lay_out(x, layout):
    """The same values in another memory layout."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        return x.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "offset":  # surrounded by NaN
        storage = torch.full((x.shape[0] + 2, x.shape[1] + 3), torch.nan, dtype=x.dtype, device=x.device)
        return storage[1:-1, 2:-1].copy_(x)
    return x


def definition(target, dtype, rows, vocabulary, layout="contiguous", filters=FILTERS):
    values = target.randn(rows, vocabulary) * 3
    values[:, 1:][torch.rand(rows, vocabulary - 1, device=target.device) < 0.2] = -torch.inf
    for options in filters:
        check(target, lay_out(values.to(DTYPES[dtype]), layout), options)


def broken_rows(target, dtype):
    """A row gives its first NaN, else its first +inf; a row of only -inf gives token 0."""
    logits = target.randn(6, 70, dtype=DTYPES[dtype])
    logits[0, 9:] = torch.nan
    logits[1, 12::3] = torch.inf
    logits[2] = -torch.inf
    logits[3, 5], logits[3, 60] = torch.inf, torch.nan
    logits[4, 33:] = -torch.tensor(torch.nan)
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}):
        tokens = dk.sample_tokens(logits, **options, backend=target.backend).tolist()
        assert tokens[:5] == [9, 12, 0, 60, 33] and 0 <= tokens[5] < 70


def equally_likely(target):
    """Ties with the last token that a filter keeps are kept."""
    values = torch.tensor([0.0, 3.0, 1.0, 3.0, 1.0, -0.0, 1.0, -2.0], device=target.device)
    logits = values.expand(40 if target.simulated else 4000, 8)
    filters = ({"top_k": 1}, {"top_k": 3}, {"top_k": 6}, {"top_p": 0.01}, {"top_p": 0.6})
    allowed = ({1, 3}, {1, 2, 3, 4, 6}, {0, 1, 2, 3, 4, 5, 6}, {1, 3}, {1, 2, 3, 4, 6})
    for options, tokens in zip(filters, allowed):
        found = dk.sample_tokens(logits, temperature=1e3, seed=5, **options, backend=target.backend)
        assert set(found.tolist()) == tokens, options


def greedy(target):
    logits = target.randn(20, 300)
    for options in ({"top_k": 1}, {"top_p": 1e-30}, {"temperature": 1e-30}):
        assert torch.equal(dk.sample_tokens(logits, **options, backend=target.backend), logits.argmax(1))


def one_row(target):
    """A row's token depends only on its logits, seed and offset."""
    logits, (seeds, offsets) = target.randn(11, 100), target.seeds(2, 11)
    options = {"top_k": 50, "top_p": 0.9, "backend": target.backend}
    whole = dk.sample_tokens(logits, seed=seeds, offset=offsets, **options)
    for part in torch.randperm(11, device=target.device).split(4):
        some = dk.sample_tokens(logits[part], seed=seeds[part], offset=offsets[part], **options)
        assert torch.equal(some, whole[part])


def empty(target):
    logits = torch.zeros(0, 5, device=target.device)
    assert dk.sample_tokens(logits, top_k=2, top_p=0.5, backend=target.backend).shape == (0,)


def frequencies(target, options):
    """Samples follow softmax(logits / temperature) over the kept tokens."""
    count, logits = 100 if target.simulated else 40_000, target.randn(13)
    tokens = dk.sample_tokens(logits.expand(count, 13), seed=int(target.seeds()), **options, backend=target.backend)
    temperature = options.get("temperature", 1.0)
    allowed = kept(logits.tolist(), temperature, options.get("top_k"), options.get("top_p"))
    p = (logits[allowed].double() / temperature).softmax(0).cpu()
    counts = torch.bincount(tokens.cpu(), minlength=13)
    assert counts.sum() == counts[allowed].sum(), "only tokens that the filters keep are sampled"
    assert frequencies_p(counts[allowed], p) > REJECT


def graph(target):
    logits, (seed, offset) = target.randn(9, 500), target.seeds(2, 9)

    def step():
        return [dk.sample_tokens(logits, top_k=50, top_p=0.9, seed=seed, offset=offset, backend=target.backend)]

    replay = captured(target, step)
    for _ in range(2):
        logits.copy_(target.randn(9, 500))
        seed.copy_(target.seeds(9))
        offset.add_(1)
        same(replay(), step())


def one_graph(target):
    def step(logits, seeds, i):
        return dk.sample_tokens(logits * 2, top_k=20, top_p=0.9, seed=seeds, offset=i, backend=target.backend) + 1

    function, seeds = compiled(step), torch.arange(2, device=target.device)
    for i in range(4):
        logits = target.randn(2, 50)
        assert torch.equal(function(logits, seeds, i), step(logits, seeds, i))


def beyond_32_bits(target):
    need_memory(12)
    rows = 2**31 // 16384 + 3
    logits, seed = torch.randn(rows, 16384, dtype=torch.bfloat16, device=target.device), target.seeds(rows)
    last = slice(rows - 2, rows)
    whole = dk.sample_tokens(logits, seed=seed, top_k=100, backend=target.backend)
    assert torch.equal(whole[last], dk.sample_tokens(logits[last], seed=seed[last], top_k=100, backend=target.backend))
