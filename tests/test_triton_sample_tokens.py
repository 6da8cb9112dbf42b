"""The Triton kernel of sample_tokens: the tests of the other backends, and rows longer than a block."""

import pytest
import test_sample_tokens
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sample_tokens import ROWS_AND_FILTERS, lay_out
from triton_for_tests import DTYPES, on_device  # noqa: F401

import dalle_kernels as dk
from dalle_kernels.backends.triton import launch

OPTIONS = [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
options = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture(params=[None, 64], ids=["", "blocks"])
def block(request, monkeypatch):
    """Tokens that are held at a time: as the table says, or 64."""
    if request.param:
        monkeypatch.setitem(launch.OVERRIDES, "sample_tokens", launch.Launch(1, request.param, 4, 1))


def random_seeds(rows):
    return torch.randint(-(2**63), 2**63 - 1, (2, rows))


def check(logits, temperature=1.0, top_k=None, top_p=None):
    test_sample_tokens.check(logits, temperature, top_k, top_p, *random_seeds(len(logits)).tolist(), "triton")


@settings(deadline=None, max_examples=20)
@given(
    vocabulary=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    **ROWS_AND_FILTERS,
)
def test_any_shape_and_filter(vocabulary, dtype, scale, masked, layout, temperature, top_k, top_p, random):
    torch.manual_seed(random)
    values = torch.randn(2, vocabulary) * scale
    values[:, 1:][torch.rand(2, vocabulary - 1) < masked] = -torch.inf
    check(lay_out(values.to(dtype), layout), temperature, top_k, top_p)


@dtypes
def test_filters(dtype, block, seed):
    logits = (torch.randn(2, 150) * 3).to(dtype)
    for filters in ({}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.7}, {"top_k": 30, "top_p": 0.9}):
        check(logits, **filters)


@dtypes
def test_the_extremes_of_filters(dtype, seed):
    logits = (torch.randn(2, 60) * 3).to(dtype)
    for filters in ({"top_k": 1}, {"top_k": 59}, {"top_k": 1000}, {"top_p": 1e-9}, {"top_p": 1 - 2**-53}):
        check(logits, **filters)
    for temperature in (1e-30, 1e3):
        check(logits, temperature, 40, 0.5)


@dtypes
def test_the_papers_vocabulary(dtype, seed):
    check((torch.randn(2, 8192) * 3).to(dtype), 0.9, 1000, 0.8)


def test_draws_are_those_of_the_reference(seed):
    """The noise is that of the reference, of which it is tested."""
    logits, (seeds, offsets) = torch.randn(100, 13), random_seeds(100)
    draws = [dk.sample_tokens(logits, seed=seeds, offset=offsets, backend=name) for name in ("triton", "reference")]
    assert (draws[0] == draws[1]).double().mean() > 0.97  # two may be as good as equal


def test_equally_likely_tokens_stay_together(block):
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, 1.0, -0.0, 1.0, -2.0]).half().expand(16, 8)
    drawn = [
        dk.sample_tokens(logits, temperature=1e3, seed=5, backend="triton", **filters).unique().tolist()
        for filters in ({"top_k": 1}, {"top_k": 3}, {"top_k": 6}, {"top_p": 0.01}, {"top_p": 0.6})
    ]
    for tokens, allowed in zip(drawn, ({1, 3}, {1, 2, 3, 4, 6}, {0, 1, 2, 3, 4, 5, 6}, {1, 3}, {1, 2, 3, 4, 6})):
        assert len(tokens) > 1 and allowed.issuperset(tokens)


def test_greedy(seed):
    logits = torch.randn(5, 300)
    for filters in ({"top_k": 1}, {"top_p": 1e-30}, {"temperature": 1e-30}):
        assert torch.equal(dk.sample_tokens(logits, backend="triton", **filters), logits.argmax(1))


@options
def test_broken_rows(options, block, seed):
    test_sample_tokens.test_broken_rows("triton", options, seed)


def test_a_row_depends_on_nothing_but_itself(seed):
    logits, (seeds, offsets) = torch.randn(5, 100), random_seeds(5)
    filters = {"top_k": 50, "top_p": 0.9, "backend": "triton"}
    whole = dk.sample_tokens(logits, seed=seeds, offset=offsets, **filters)
    for part in torch.randperm(5).split(2):
        some = dk.sample_tokens(logits[part], seed=seeds[part], offset=offsets[part], **filters)
        assert torch.equal(some, whole[part])


def test_empty_batch():
    assert dk.sample_tokens(torch.zeros(0, 5), top_k=2, top_p=0.5, backend="triton").shape == (0,)


def test_opcheck(seed):
    arguments = torch.randn(3, 50), torch.arange(3), torch.arange(3), 0.9, 10, 0.8
    torch.library.opcheck(torch.ops.dalle_kernels_triton.sample_tokens.default, arguments)


def test_compiles_into_one_graph(seed):
    def step(logits, seeds, i):
        return dk.sample_tokens(logits * 2, top_k=20, top_p=0.9, seed=seeds, offset=i, backend="triton") + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    seeds = torch.arange(2)
    for i in range(4):
        logits = torch.randn(2, 50)
        assert torch.equal(compiled(logits, seeds, i), step(logits, seeds, i))
