"""The CUDA kernel of sample_tokens under emulation, against the definition in float64; and that a row's draw depends on
its logits, seed and offset alone.
"""

import pytest
import torch
from cuda_emulation import emulated
from test_sample_tokens import DTYPES, acceptable, kept, lay_out

from statistics_for_tests import REJECT, frequencies_p

LAYOUTS = ["contiguous", "transposed", "strided", "offset"]


def sample(logits, seeds, offsets, temperature=1.0, top_k=None, top_p=None, **options):
    keep = min(top_k or 0, logits.shape[1]), 1.0 if top_p is None else top_p
    return emulated.run("sample_tokens", logits, seeds, offsets, temperature, *keep, **options)


def random_seeds(rows):
    return torch.randint(-(2**63), 2**63 - 1, (2, rows))


def check(logits, temperature=1.0, top_k=None, top_p=None):
    seeds, offsets = random_seeds(len(logits))
    tokens = sample(logits, seeds, offsets, temperature, top_k, top_p)
    assert tokens.dtype == torch.int64 and tokens.shape == logits.shape[:1]
    rows = zip(logits.double().tolist(), seeds.tolist(), offsets.tolist(), tokens.tolist())
    for row, seed, offset, token in rows:
        good = acceptable(row, seed, offset, temperature, top_k, top_p)
        assert token in good, f"token {token}, expected one of {good}"


def random_logits(rows, vocabulary, dtype, scale=3.0, masked=0.0):
    values = torch.randn(rows, vocabulary) * scale
    values[:, 1:][torch.rand(rows, vocabulary - 1) < masked] = -torch.inf
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 17, 64, 257, 2047])
def test_shapes_and_filters(vocabulary, dtype, seed):
    for layout in LAYOUTS:
        logits = lay_out(random_logits(2, vocabulary, dtype, masked=0.2), layout)
        for options in ({}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.7}, {"top_k": 30, "top_p": 0.9}):
            check(logits, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_the_extremes_of_filters(scale, dtype, seed):
    logits = random_logits(3, 300, dtype, scale)
    for top_k in (1, 299, 300, 1000):
        check(logits, top_k=top_k)
    for top_p in (1e-9, 0.999999, 1 - 2**-53, 1.0):
        check(logits, top_p=top_p)
    for temperature in (1e-30, 1e-3, 1e3):
        check(logits, temperature, 40, 0.5)


def test_the_papers_vocabulary(seed):
    logits = random_logits(2, 8192, torch.float32)
    for options in ({}, {"temperature": 0.7, "top_k": 100}, {"temperature": 1.3, "top_p": 0.9}):
        check(logits, **options)


@pytest.mark.parametrize(("dtype", "top_p"), [(torch.float32, None), (torch.bfloat16, 0.6)], ids=str)
def test_a_vocabulary_beyond_shared_memory(dtype, top_p, seed):
    check(random_logits(1, 60_001, dtype), top_k=50, top_p=top_p)


@pytest.mark.parametrize(
    ("draws", "options"), [(2000, {"temperature": 0.5}), (100, {"top_k": 8, "top_p": 0.8})], ids=str
)
def test_frequencies(draws, options, seed):
    """The draws follow softmax(logits / temperature) over the tokens kept."""
    logits = torch.randn(13)
    tokens = sample(logits.expand(draws, 13), torch.full((draws,), seed), torch.arange(draws), **options)
    allowed = kept(logits.tolist(), options.get("temperature", 1.0), options.get("top_k"), options.get("top_p"))
    p = (logits[allowed].double() / options.get("temperature", 1.0)).softmax(0)
    counts = torch.bincount(tokens, minlength=13)
    assert counts.sum() == counts[allowed].sum(), "only tokens that the filters keep are drawn"
    assert frequencies_p(counts[allowed], p) > REJECT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equally_likely_tokens_stay_together(dtype):
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, 1.0, -0.0, 1.0, -2.0], dtype=dtype).expand(40, 8)
    drawn = [
        sample(logits, torch.full((40,), 5), torch.arange(40), temperature=1e3, **options).unique().tolist()
        for options in ({"top_k": 1}, {"top_k": 3}, {"top_k": 6}, {"top_p": 0.01}, {"top_p": 0.6})
    ]
    assert drawn == [[1, 3], [1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 5, 6], [1, 3], [1, 2, 3, 4, 6]]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broken_rows(dtype, options, seed):
    logits = torch.randn(6, 70).to(dtype)
    logits[0, 9:] = torch.nan
    logits[1, 12::3] = torch.inf
    logits[2] = -torch.inf
    logits[3, 5], logits[3, 60] = torch.inf, torch.nan
    logits[4, 33:] = -torch.tensor(torch.nan)
    tokens = sample(logits, *random_seeds(6), **options)
    assert tokens[:5].tolist() == [9, 12, 0, 60, 33] and 0 <= tokens[5] < 70


def test_a_row_depends_on_nothing_but_itself(seed):
    rows, options = 11, {"top_k": 50, "top_p": 0.9}
    logits, (seeds, offsets) = torch.randn(rows, 100), random_seeds(rows)
    whole = sample(logits, seeds, offsets, **options, seed=1)
    assert torch.equal(sample(logits, seeds, offsets, **options, seed=2), whole)
    for part in torch.randperm(rows).split(4):
        assert torch.equal(sample(logits[part], seeds[part], offsets[part], **options), whole[part])


def test_one_launch_and_an_empty_batch(seed):
    sample(torch.randn(3, 40), *random_seeds(3), top_k=7, top_p=0.5)
    assert emulated.counts()["launches"] == 1
    assert sample(torch.zeros(0, 5), *random_seeds(0), top_k=2, top_p=0.5).shape == (0,)
