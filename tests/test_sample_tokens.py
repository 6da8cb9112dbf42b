"""sample_tokens: threads of the CPU kernel, seeds and offsets, and invalid arguments. test_conformance.py has the
requirements on every backend.
"""

import math

import pytest
import torch

import dalle_kernels as dk
from conformance import Target

CPU = Target("cpu")


def test_tokens_do_not_depend_on_threads(seed):
    logits, (seeds, offsets) = torch.randn(41, 100), CPU.seeds(2, 41)
    threads, tokens = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            tokens.append(dk.sample_tokens(logits, top_k=50, top_p=0.9, seed=seeds, offset=offsets, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


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


def test_no_gradient():
    assert not dk.sample_tokens(torch.zeros(2, 5, requires_grad=True)).requires_grad


def test_opcheck(seed):
    arguments = torch.randn(3, 50), torch.arange(3), torch.arange(3), 0.9, 10, 0.8
    torch.library.opcheck(torch.ops.dalle_kernels.sample_tokens.default, arguments)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("logits", "options", "error", "message"),
    [
        (X[0], {}, ValueError, r"shape \[R, V\] with at least one token; got \[3\]"),
        (X[:, :0], {}, ValueError, r"got \[2, 0\]"),
        (X.int(), {}, TypeError, "float32, bfloat16, float16 or float64; got torch.int32"),
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
