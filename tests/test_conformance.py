"""The conformance suite on every target of this machine, and on random shapes. Triton's interpreter needs a separate
process:

TRITON_INTERPRET=1 python -m pytest -q tests/test_conformance.py
"""

import math

import pytest
import torch
from cuda_emulation.backend import EMULATED
from hypothesis import given
from hypothesis import strategies as st

import accuracy
import dalle_kernels as dk
from accuracy import mostly
from conformance import Target, cases, decode_attention, gumbel_softmax, sample_tokens, sparse_attention
from conformance.target import DTYPES
from dalle_kernels.backends import BACKENDS
from dalle_kernels.backends.triton import interpreted
from patterns_for_tests import NAMES, every_pattern

if interpreted():
    from triton_for_tests import TARGET, on_device  # noqa: F401

    TARGETS = [TARGET]
else:
    TARGETS = [
        Target("cpu"),
        Target("reference", kernels=False, compiles=False),
        Target("emulated", simulated=True, compiles=False),
    ]
    if torch.cuda.is_available():
        TARGETS += [Target(name, "cuda") for name in ("cuda", "triton") if BACKENDS[name].problem is None]


def marks(case):
    return [pytest.mark.slow] * case.slow + [pytest.mark.full] * case.full


CASES = [(target, case) for target in TARGETS for case in cases(target)]
FIRST = Target("cpu") if not interpreted() else TARGETS[0]
DTYPE = st.sampled_from(FIRST.dtypes)
SEED = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setitem(BACKENDS, "emulated", EMULATED)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from NumPy in the interpreter: padding rows compute 0 / 0
@pytest.mark.parametrize(
    ("target", "case"),
    [pytest.param(*pair, marks=marks(pair[1])) for pair in CASES],
    ids=[f"{target.backend}: {case.name}" for target, case in CASES],
)
def test_conforms(target, case, seed):
    if BACKENDS[target.backend].problem:
        pytest.skip(BACKENDS[target.backend].problem)
    case.check()


# -- random shapes


@pytest.mark.skipif(FIRST.simulated, reason="too slow in the interpreter")
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 31, 32, 33, 64, 80, 127, 128]),
    text_len=st.integers(0, 70),
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    name=st.sampled_from(NAMES),
    dtype=DTYPE,
    layout=st.sampled_from(sparse_attention.LAYOUTS),
    split=st.sampled_from([None, 1, 3]),
    data=st.data(),
)
def test_sparse_attention_of_any_shape(batch, heads, dim, text_len, grid, name, dtype, layout, split, data):
    pattern = every_pattern(text_len, grid)[name]
    n = data.draw(st.integers(1, pattern.seq_len), label="n")
    torch.manual_seed(data.draw(SEED, label="seed"))
    shape = max(batch, 2**17 // (heads * n * dim), 16 // heads), heads, n, dim

    def trial():
        tensors, (grad, *_) = (sparse_attention.make(FIRST, layout, *shape, DTYPES[dtype]) for _ in range(2))
        sparse_attention.check(FIRST, pattern, tensors, grad, dtype)

    with FIRST.split_after(split):
        mostly(trial)


@pytest.mark.skipif(FIRST.simulated, reason="too slow in the interpreter")
@given(
    prompts=st.integers(1, 3),
    candidates=st.sampled_from([1, 2, 3, 4, 5, 31, 33]),
    dim=st.sampled_from([1, 3, 31, 32, 33, 64, 80, 127, 128]),
    text_len=st.sampled_from([0, 1, 7, 8, 9, 130, 257]),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    name=st.sampled_from(NAMES),
    dtype=DTYPE,
    data=st.data(),
)
def test_decode_attention_of_any_shape(prompts, candidates, dim, text_len, grid, name, dtype, data):
    start, given = data.draw(st.integers(0, grid[0] * grid[1] - 1), label="start"), None
    if candidates == 1 and data.draw(st.booleans(), label="text"):
        start, given = 0, data.draw(st.integers(0, text_len), label="given")
    torch.manual_seed(data.draw(SEED, label="seed"))
    pattern = every_pattern(text_len, grid)[name]
    numbers = prompts * candidates * dim * (grid[0] * grid[1] - start)
    lengths = data.draw(st.none() | st.lists(st.integers(0, text_len), min_size=prompts, max_size=prompts))
    sizes = dict(prompts=prompts, candidates=candidates, dim=dim, start=start, lengths=lengths, given=given)
    sizes["heads"] = -(-300 // numbers)  # the largest error over a few elements is a matter of chance
    mostly(lambda: decode_attention.accuracy(FIRST, pattern, dtype, **sizes))


@given(
    dims=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    classes=st.sampled_from([1, 2, 3, 15, 16, 17, 31, 64, 65, 100, 255, 300, 1025]),
    data=st.data(),
    hard=st.booleans(),
    tau=st.floats(0.05, 20),
    dtype=DTYPE,
    layout=st.sampled_from(gumbel_softmax.LAYOUTS),
)
def test_gumbel_softmax_of_any_shape(dims, classes, data, hard, tau, dtype, layout):
    dim = data.draw(st.integers(0, len(dims)), label="dim")
    while math.prod(dims) > 60:  # a maximum number of positions
        dims[dims.index(max(dims))] //= 2
    # The largest error over a few positions is a matter of chance; over thousands it is stable.
    shape = [max(1, 2000 // math.prod(dims)), *dims[:dim], classes, *dims[dim:]]
    torch.manual_seed(data.draw(SEED, label="seed"))
    mostly(lambda: gumbel_softmax.accuracy(FIRST, dtype, hard, shape, dim + 1, layout, taus=(tau,)))


@given(
    rows=st.integers(1, 5),
    vocabulary=st.sampled_from([1, 2, 3, 7, 16, 17, 63, 64, 255, 256, 257, 300, 1025]),
    dtype=DTYPE,
    scale=st.sampled_from([0.0, 1.0, 8.0]),
    masked=st.sampled_from([0.0, 0.3]),
    layout=st.sampled_from(sample_tokens.LAYOUTS),
    temperature=st.sampled_from([1e-3, 0.5, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 300),
    top_p=st.none() | st.floats(1e-9, 1.0),
    random=SEED,
)
def test_sample_tokens_of_any_shape(
    rows, vocabulary, dtype, scale, masked, layout, temperature, top_k, top_p, random
):
    torch.manual_seed(random)
    values = FIRST.randn(rows, vocabulary) * scale
    values[:, 1:][torch.rand(rows, vocabulary - 1, device=FIRST.device) < masked] = -torch.inf
    logits = sample_tokens.lay_out(values.to(DTYPES[dtype]), layout)
    sample_tokens.check(FIRST, logits, dict(temperature=temperature, top_k=top_k, top_p=top_p))


# -- the checks can fail


@pytest.mark.parametrize(
    ("operation", "prefix"),
    [("sparse_attention", "attention"), ("gumbel_softmax", "gumbel"), ("sample_tokens", "sample"),
     ("decode_attention", "decode")],
)  # fmt: skip
def test_one_wrong_number_is_found(operation, prefix, monkeypatch, seed):
    function = getattr(dk, operation)

    def broken(*args, **options):
        result = function(*args, **options)
        first, *rest = result if isinstance(result, tuple) else (result,)
        bump = torch.zeros_like(first)
        bump[(-1,) * bump.ndim] = 1
        return (first + bump, *rest) if rest else first + bump

    case = next(case for case in cases(Target("reference")) if case.name.startswith(prefix))
    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        patched.setattr(dk, operation, broken)
        patched.setattr(accuracy, "ratios", None)  # which `make fuzz` records instead of failing
        case.check()
