"""sample_tokens: the distribution, what top-k and top-p keep, and that a draw depends on its own row only."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_kernels as dk
from dalle_kernels import philox

BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kept(row, temperature, top_k, top_p):
    """The set of tokens that may be drawn, by sorting one row in float64."""
    probability = (row.double() / temperature).softmax(0)
    tokens = probability.argsort(descending=True).tolist()
    if top_k is not None and top_k < len(tokens):
        least = row[tokens[top_k - 1]]
        tokens = [token for token in tokens if row[token] >= least]
    if top_p is not None:
        total, needed = probability[tokens].sum(), []
        for token in tokens:
            if sum(probability[t] for t in needed) / total >= top_p and row[token] < row[needed[-1]]:
                break
            needed.append(token)
        tokens = needed
    return set(tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.6, None, None), (1.0, 4, None), (2.0, None, 0.7), (1.0, 6, 0.8)],
)
def test_frequencies_by_chi_square(backend, temperature, top_k, top_p, seed):
    draws, vocab = 40_000, 9
    row = torch.randn(vocab)
    tokens = dk.sample_tokens(
        row.expand(draws, vocab), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, backend=backend
    )
    allowed = sorted(kept(row, temperature, top_k, top_p))
    expected = (row[allowed].double() / temperature).softmax(0) * draws
    counts = torch.bincount(tokens, minlength=vocab)
    assert counts.sum() == counts[allowed].sum(), "a token outside the kept set was drawn"
    chi_square = ((counts[allowed] - expected) ** 2 / expected).sum().item()
    freedom = len(allowed) - 1
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom) + 12  # beyond the 1e-6 quantile for up to 8 degrees


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 300),
    top_k=st.none() | st.integers(1, 320),
    top_p=st.none() | st.floats(0.01, 1.0),
    temperature=st.floats(0.1, 5.0),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    data=st.data(),
)
def test_cpu_draws_what_the_reference_draws(rows, vocab, top_k, top_p, temperature, dtype, strided, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    logits = (3 * torch.randn(rows, 2 * vocab)).to(dtype)
    logits = logits[:, ::2] if strided else logits[:, :vocab]
    arguments = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    arguments |= dict(seed=torch.randint(-(2**62), 2**62, (rows,)), offset=torch.randint(2**40, (rows,)))
    ours = dk.sample_tokens(logits, **arguments, backend="cpu")
    reference = dk.sample_tokens(logits.double(), **arguments, backend="reference")
    assert ours.shape == (rows,) and ours.dtype == torch.int64
    for i in (ours != reference).nonzero().flatten().tolist():
        assert_near_tie(logits[i], ours[i], reference[i], arguments, i)


def assert_near_tie(row, ours, theirs, arguments, i):
    """Rounding may only decide between noisy logits that are equal up to it, or at top-p's very cut."""
    seed, offset = arguments["seed"][i], arguments["offset"][i]
    tokens = torch.stack([ours, theirs])
    noise = philox.gumbel(philox.random_bits(seed, offset, tokens), torch.float64)
    noisy = row.double()[tokens] / arguments["temperature"] + noise
    how = arguments["temperature"], arguments["top_k"]
    cuts = [None if arguments["top_p"] is None else arguments["top_p"] * factor for factor in (1 - 1e-5, 1 + 1e-5)]
    at_the_cut = kept(row, *how, cuts[0]) != kept(row, *how, cuts[1])
    assert abs(noisy[0] - noisy[1]) < 1e-4 or at_the_cut


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy(backend, dtype, seed):
    logits = torch.stack([torch.randperm(501) for _ in range(20)]).to(dtype) / 8
    best = logits.argmax(1)
    unique = (logits == logits.max(1, keepdim=True).values).sum(1) == 1  # 16-bit floats may tie
    for how in (dict(top_k=1), dict(top_p=1e-6)):
        drawn = dk.sample_tokens(logits, **how, seed=seed, backend=backend)
        assert torch.equal(drawn[unique], best[unique])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_itself_only(backend, seed):
    logits, seeds, offsets = torch.randn(37, 129), torch.randint(2**62, (37,)), torch.randint(2**62, (37,))
    whole = dk.sample_tokens(logits, top_k=50, top_p=0.9, seed=seeds, offset=offsets, backend=backend)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for part in (slice(0, 1), slice(5, 23), slice(36, 37)):
            drawn = dk.sample_tokens(
                logits[part], top_k=50, top_p=0.9, seed=seeds[part], offset=offsets[part], backend=backend
            )
            assert torch.equal(drawn, whole[part])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_and_offsets_change_the_draw(backend):
    logits = torch.zeros(1, 4096)
    draws = {dk.sample_tokens(logits, seed=s, offset=o, backend=backend).item() for s in range(8) for o in range(8)}
    assert len(draws) > 55  # 64 draws of 4096 tokens: 0.5 coincidences expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_tokens_are_never_drawn(backend, seed):
    logits = torch.randn(2000, 33)
    logits[:, ::3] = float("-inf")
    for how in ({}, dict(top_k=30), dict(top_p=0.999)):
        assert (dk.sample_tokens(logits, **how, seed=seed, backend=backend) % 3 != 0).all()


def test_compiles_into_one_graph(seed):
    logits, seeds = torch.randn(5, 77), torch.arange(5)

    def draw(logits, seeds):
        return dk.sample_tokens(logits * 2, top_k=9, seed=seeds, offset=3)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, seeds), draw(logits, seeds))


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("logits", "arguments", "error", "message"),
    [
        (X[0], {}, ValueError, r"shape \[R, V\].*got \[8\]"),
        (X[:, :0], {}, ValueError, r"got \[2, 0\]"),
        (X.long(), {}, TypeError, "int64"),
        (X, dict(temperature=0), ValueError, "temperature must be a positive.*got 0"),
        (X, dict(temperature=float("nan")), ValueError, "got nan"),
        (X, dict(top_k=0), ValueError, "top_k must be an int of at least 1.*got 0"),
        (X, dict(top_p=0), ValueError, r"top_p must lie in \(0, 1\].*got 0"),
        (X, dict(top_p=1.5), ValueError, "got 1.5"),
        (X, dict(seed=torch.zeros(3, dtype=torch.int64)), ValueError, "seed"),
        (X, dict(seed=0.5), TypeError, "seed"),
        (X, dict(seed=0, offset=torch.zeros(2)), ValueError, "offset"),
    ],
)
def test_bad_arguments_are_refused(logits, arguments, error, message):
    with pytest.raises(error, match=message):
        dk.sample_tokens(logits, **arguments)
