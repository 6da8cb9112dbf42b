"""sample_tokens against a loop over tokens in float64 and against the distribution it must follow; and that a row's
draw depends on its logits, seed and offset alone.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_kernels as dk
from dalle_kernels import _host
from statistics_for_tests import REJECT, frequencies_p

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "reference"]


def kept(row, temperature, top_k, top_p):
    """The tokens that may be drawn, by definition; `row` is a list of floats."""
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
    """Gumbel noise in float64 from the C++ words, u in float32 as specified."""
    words = _host.philox(seed, offset, 0, count).astype(np.float32)
    u = np.minimum((words + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24)).astype(np.float64)
    return -np.log(-np.log1p(-u))


def acceptable(row, seed, offset, temperature, top_k, top_p):
    """The tokens that float32 may take: the best, those within rounding of it, and the best of a set cut within
    rounding of top_p.
    """
    scores = np.array(row) / temperature + noise(seed, offset, len(row))
    result = set()
    for p in (top_p,) if top_p is None or top_p == 1 else (top_p * (1 - 1e-6), top_p, min(1, top_p * (1 + 1e-6))):
        tokens = kept(row, temperature, top_k, p)
        best = max(scores[tokens])
        close = 2e-6 * max(np.abs(scores[np.isfinite(scores)]))
        result |= {token for token in tokens if scores[token] >= best - close}
    return result


def check(logits, temperature, top_k, top_p, seeds, offsets, backend):
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "backend": backend}
    tokens = dk.sample_tokens(logits, seed=torch.tensor(seeds), offset=torch.tensor(offsets), **options)
    assert tokens.dtype == torch.int64 and tokens.shape == logits.shape[:1]
    for row, seed, offset, token in zip(logits.double().tolist(), seeds, offsets, tokens.tolist()):
        good = acceptable(row, seed, offset, temperature, top_k, top_p)
        assert token in good, f"token {token}, expected one of {good}"


ROWS_AND_FILTERS = dict(
    scale=st.sampled_from([0.0, 1.0, 8.0]),
    masked=st.sampled_from([0.0, 0.3]),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "offset"]),
    temperature=st.sampled_from([1e-3, 0.5, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 300),
    top_p=st.none() | st.floats(1e-9, 1.0),
    random=st.integers(0, 2**31),
)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 5),
    vocabulary=st.sampled_from([1, 2, 3, 7, 16, 17, 63, 64, 255, 256, 257, 300, 1025]),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(BACKENDS),
    **ROWS_AND_FILTERS,
)
def test_any_shape_and_filter(
    rows, vocabulary, dtype, scale, masked, layout, temperature, top_k, top_p, random, backend
):
    torch.manual_seed(random)
    values = torch.randn(rows, vocabulary) * scale
    values[:, 1:][torch.rand(rows, vocabulary - 1) < masked] = -torch.inf
    logits = lay_out(values.to(dtype), layout)
    seeds, offsets = torch.randint(-(2**63), 2**63 - 1, (2, rows)).tolist()
    check(logits, temperature, top_k, top_p, seeds, offsets, backend)


def lay_out(x, layout):
    """The same values in other memory."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        return x.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "offset":  # NaN all around
        storage = torch.full((x.shape[0] + 2, x.shape[1] + 3), torch.nan, dtype=x.dtype)
        return storage[1:-1, 2:-1].copy_(x)
    return x


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_papers_vocabulary(backend, seed):
    logits = torch.randn(3, 8192) * 3
    for options in ((1.0, None, None), (0.7, 100, None), (1.3, None, 0.9), (1.0, 2000, 0.5)):
        check(logits, *options, [seed, -seed, 0], [7, 8, -9], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 8, "top_p": 0.8}]
)
def test_frequencies(options, backend, seed):
    """The draws follow softmax(logits / temperature) over the tokens kept."""
    draws, logits = 40_000, torch.randn(13)
    tokens = dk.sample_tokens(logits.expand(draws, 13), seed=seed, backend=backend, **options)
    temperature = options.get("temperature", 1.0)
    allowed = kept(logits.tolist(), temperature, options.get("top_k"), options.get("top_p"))
    p = (logits[allowed].double() / temperature).softmax(0)
    counts = torch.bincount(tokens, minlength=13)
    assert counts.sum() == counts[allowed].sum(), "only tokens that the filters keep are drawn"
    assert frequencies_p(counts[allowed], p) > REJECT


@pytest.mark.parametrize("backend", BACKENDS)
def test_equally_likely_tokens_stay_together(backend):
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, 1.0, -0.0, 1.0, -2.0]).expand(4000, 8)
    drawn = [
        dk.sample_tokens(logits, seed=5, backend=backend, **options).unique().tolist()
        for options in ({"top_k": 1}, {"top_k": 3}, {"top_k": 6}, {"top_p": 0.01}, {"top_p": 0.9})
    ]
    assert drawn == [[1, 3], [1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 5, 6], [1, 3], [1, 2, 3, 4, 6]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy(backend, seed):
    logits = torch.randn(50, 300)
    for options in ({"top_k": 1}, {"top_p": 1e-30}, {"temperature": 1e-30}):
        assert torch.equal(dk.sample_tokens(logits, backend=backend, **options), logits.argmax(1))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_rows(backend, options, seed):
    logits = torch.randn(5, 70)
    logits[0, 9:] = torch.nan
    logits[1, 12::3] = torch.inf
    logits[2] = -torch.inf
    logits[3, 5], logits[3, 60] = torch.inf, torch.nan
    tokens = dk.sample_tokens(logits, backend=backend, **options)
    assert tokens[:4].tolist() == [9, 12, 0, 60] and 0 <= tokens[4] < 70


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_nothing_but_itself(backend, seed):
    rows = 41
    logits = torch.randn(rows, 100)
    seeds, offsets = torch.randint(-(2**63), 2**63 - 1, (2, rows))
    options = {"top_k": 50, "top_p": 0.9, "backend": backend}
    whole = dk.sample_tokens(logits, seed=seeds, offset=offsets, **options)
    order, cut = torch.randperm(rows), int(torch.randint(1, rows, ()))
    for part in (order[:cut], order[cut:]):
        some = dk.sample_tokens(logits[part], seed=seeds[part], offset=offsets[part], **options)
        assert torch.equal(some, whole[part])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(dk.sample_tokens(logits, seed=seeds, offset=offsets, **options), whole)
    finally:
        torch.set_num_threads(threads)


def test_seeds_and_offsets(seed):
    logits = torch.zeros(200, 1000)
    ones, numbers = torch.ones(200, dtype=torch.int64), torch.arange(200)
    tokens = dk.sample_tokens(logits, seed=7)
    assert torch.equal(tokens, dk.sample_tokens(logits, seed=7 * ones, offset=numbers))
    assert tokens.unique().numel() > 100, "the rows of one seed have noise of their own"
    tokens = dk.sample_tokens(logits, seed=numbers)
    assert torch.equal(tokens, dk.sample_tokens(logits, seed=numbers, offset=0))
    assert not torch.equal(tokens, dk.sample_tokens(logits, seed=numbers, offset=1))
    assert dk.sample_tokens(logits, seed=7, offset=3).unique().numel() == 1
    torch.manual_seed(seed)
    drawn = dk.sample_tokens(logits)
    assert drawn.unique().numel() > 100 and not torch.equal(drawn, dk.sample_tokens(logits))
    torch.manual_seed(seed)
    assert torch.equal(drawn, dk.sample_tokens(logits)), "torch's generator decides where no seed is given"


def test_no_gradient_and_empty_batch():
    logits = torch.zeros(2, 5, requires_grad=True)
    assert not dk.sample_tokens(logits).requires_grad
    for backend in BACKENDS:
        assert dk.sample_tokens(torch.zeros(0, 5), top_k=2, top_p=0.5, backend=backend).shape == (0,)


def test_opcheck(seed):
    arguments = torch.randn(3, 50), torch.arange(3), torch.arange(3), 0.9, 10, 0.8
    torch.library.opcheck(torch.ops.dalle_kernels.sample_tokens.default, arguments)


def test_compiles_into_one_graph(seed):
    def step(logits, seeds, i):
        return dk.sample_tokens(logits * 2, top_k=20, top_p=0.9, seed=seeds, offset=i) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    seeds = torch.arange(4)
    for i in range(12):
        logits = torch.randn(4, 50)
        assert torch.equal(compiled(logits, seeds, i), step(logits, seeds, i))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("logits", "options", "error", "message"),
    [
        (X[0], {}, ValueError, r"shape \[R, V\] with at least one token; got \[3\]"),
        (X[:, :0], {}, ValueError, r"got \[2, 0\]"),
        (X.int(), {}, TypeError, "floating-point dtype; got torch.int32"),
        ([[1.0]], {}, TypeError, "must be a tensor; got list"),
        (X, {"temperature": 0.0}, ValueError, r"temperature .* \(top_k=1 takes the most likely token\); got 0.0"),
        (X, {"temperature": math.nan}, ValueError, "got nan"),
        (X, {"temperature": math.inf}, ValueError, "got inf"),
        (X, {"top_k": 0}, ValueError, "top_k must be an int of at least 1, or None to keep all tokens; got 0"),
        (X, {"top_k": 2.0}, ValueError, "got 2.0"),
        (X, {"top_p": 0.0}, ValueError, r"top_p must lie in \(0, 1\].*got 0.0"),
        (X, {"top_p": 1.5}, ValueError, "got 1.5"),
        (X, {"top_p": math.nan}, ValueError, "got nan"),
        (X, {"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed .* tensor \[2\] on cpu; got .*\[3\]"),
        (X, {"seed": torch.zeros(2)}, ValueError, "got torch.float32"),
        (X, {"seed": 2**63}, ValueError, "seed must fit in 64 bits"),
        (X, {"offset": "1"}, TypeError, "offset must be an int .* got str"),
        (X.double(), {"backend": "cpu"}, NotImplementedError, "float64"),
    ],
)
def test_bad_arguments_are_refused(logits, options, error, message):
    with pytest.raises(error, match=message):
        dk.sample_tokens(logits, **options)
