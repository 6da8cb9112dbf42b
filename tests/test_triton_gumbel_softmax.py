"""The Triton kernels of gumbel_softmax: tests of the `cpu` backend, and how tiles are cut."""

import pytest
import test_gumbel_softmax
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gumbel_softmax import (  # noqa: F401
    LAYOUTS,
    check,
    make,
    plain_gumbel_softmax,
    run,
    test_compiles_into_one_graph,
    test_double_backward_is_refused,
    test_kl_alone_and_y_alone_have_their_gradients,
    test_kl_of_the_uniform_and_of_a_certain_choice,
    test_masked_and_broken_rows,
    test_noise_follows_the_shape_not_the_strides,
    test_padding_of_the_logits_is_never_read,
    test_soft_and_hard_choose_the_same,
)
from triton_for_tests import DTYPES, on_device  # noqa: F401

import dalle_kernels as dk
from dalle_kernels import philox
from dalle_kernels.backends.triton import gumbel_softmax, launch

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
hards = pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
KERNELS = "gumbel_softmax", "gumbel_softmax.last"


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture
def tiles(monkeypatch):
    """tiles(rows, columns): what a tile has at most."""
    return lambda rows, columns: [
        monkeypatch.setitem(launch.OVERRIDES, name, launch.Launch(rows, columns, 4, 1)) for name in KERNELS
    ]


@dtypes
@hards
@pytest.mark.parametrize(
    ("shape", "dim"), [((9, 100, 32), 1), ((500, 65), 1), ((12, 50, 7, 5), 1), ((500, 4), 1), ((30, 400), 0)], ids=str
)
def test_matches_float64(shape, dim, hard, dtype, seed):
    tau = (1 / 16, 1.0, 5.0)[int(torch.randint(3, ()))]
    check(make("contiguous", shape, dtype), tau, hard, dim, "triton", seed)


@settings(deadline=None, max_examples=15)
@given(
    inner=st.lists(st.integers(1, 9), max_size=2),
    outer=st.integers(1, 5),
    classes=st.integers(1, 300),
    hard=st.booleans(),
    tau=st.floats(0.05, 20),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    key=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_and_layout(inner, outer, classes, hard, tau, dtype, layout, key):
    torch.manual_seed(key)
    x = make(layout, (outer, classes, *inner), dtype)
    y, kl = dk.gumbel_softmax(x, tau, hard, dim=1, seed=key, return_kl=True, backend="triton")
    expected, expected_kl = plain_gumbel_softmax(x.double(), key, tau, False, 1)
    torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-5, atol=1e-5)
    if hard:
        test_gumbel_softmax.assert_argmax(y, x, key, 1)
    else:
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-5 / min(tau, 1) + torch.finfo(dtype).eps)


@dtypes
@hards
@pytest.mark.parametrize(("shape", "dim"), [((50, 150), 1), ((2, 150, 33), 1)], ids=str)
def test_positions_of_several_chunks(shape, dim, hard, dtype, tiles, monkeypatch, seed):
    """Merged in several steps too."""
    tiles(32, 32)
    monkeypatch.setattr(gumbel_softmax, "CHUNKS", 2)
    check(make("contiguous", shape, dtype), 0.7, hard, dim, "triton", seed)


@hards
@pytest.mark.parametrize("shape", [(8, 70), (1, 70, 8)], ids=str)
def test_broken_rows_of_several_chunks(shape, hard, tiles, backend, seed):
    tiles(16, 16)
    test_masked_and_broken_rows(shape, hard, backend, seed)


@hards
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_large_logits(hard, offset, seed):
    check(torch.randn(12, 70, 60) * 30 + offset, 0.5, hard, 1, "triton", seed)
    check((torch.randn(1000, 70) * 30 + offset).half(), 0.5, hard, 1, "triton", seed)


@pytest.mark.parametrize("tile", [(32, 32), (128, 32)])
@pytest.mark.parametrize(("shape", "dim"), [((40, 50), 1), ((2, 100, 33), 1), ((70, 2, 3), 0)], ids=str)
def test_noise(shape, dim, tile, tiles, seed):
    """Where logits are 0 and tau is 1, log y is the noise but for a constant; of all 64 bits of the seed."""
    tiles(*tile)
    for key in (0, -1, 0x299F31D0A4093822, int(torch.randint(-(2**63), 2**63 - 1, ()))):
        noise = philox.gumbel_noise(shape, torch.tensor(key), torch.float64)
        y = dk.gumbel_softmax(torch.zeros(shape), dim=dim, seed=key, backend="triton")
        assert (y.double().log() - noise.log_softmax(dim)).abs().max() < 2e-6


@pytest.mark.parametrize("tile", [(32, 32), (128, 256)])
def test_the_first_of_equals_is_taken(tile, tiles, seed):
    """Noise of at most 23 vanishes beside 1e10, so that the largest logits are equal."""
    tiles(*tile)
    x = torch.zeros(6, 900, 4)
    first = torch.randint(0, 600, (6, 4))
    for offset in (0, 1, 33, 290):
        x.scatter_(1, (first + offset)[:, None], 1e10)
    for logits in (x, x.movedim(1, 2).reshape(24, 900)):
        y = dk.gumbel_softmax(logits, hard=True, dim=1, seed=seed, backend="triton")
        assert torch.equal(y.argmax(1).flatten(), first.flatten()) and (y.sum(1) == 1).all()


@hards
@pytest.mark.parametrize(("shape", "dim"), [((5, 300, 3, 7), 1), ((7, 300), 1)], ids=str)
def test_bits_do_not_depend_on_later_batch_entries(shape, dim, hard, tiles, seed):
    """Noise counts elements in C order, so the first entries keep theirs."""
    tiles(64, 64)
    x, grad = torch.randn(2, *shape)

    def outputs(count):
        def function(x):
            return dk.gumbel_softmax(x, 0.5, hard, dim=dim, seed=seed, return_kl=True, backend="triton")

        return run(function, x[:count], grad[:count], torch.ones(x[:count].sum(dim).shape))

    for a, b in zip(outputs(2), outputs(shape[0])):
        assert torch.equal(a, b[:2])


@hards
def test_extremes_of_tau(hard, seed):
    x = torch.randn(20, 64)
    cold, hot = (dk.gumbel_softmax(x, tau, hard, seed=seed, backend="triton") for tau in (1e-30, 1e5))
    assert torch.equal(cold, dk.gumbel_softmax(x, hard=True, seed=seed, backend="triton"))
    assert hard or (hot * 64 - 1).abs().max() < 40 / 1e5  # no logit plus noise is farther than 40 from another


@pytest.mark.parametrize(("shape", "dim"), [((0, 5), 1), ((2, 5, 0), 1)], ids=str)
def test_empty(shape, dim):
    test_gumbel_softmax.test_empty(shape, dim, "triton")


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("return_kl", [False, True])
@hards
def test_opcheck(hard, return_kl, layout, seed):
    x = make(layout, (3, 10, 4), torch.float32).requires_grad_()
    arguments = (x, torch.tensor(seed), torch.tensor(0.5), hard, 1, return_kl)
    torch.library.opcheck(torch.ops.dalle_kernels_triton.gumbel_softmax.default, arguments)


@pytest.mark.slow
@dtypes
@hards
def test_the_papers_vocabulary(hard, dtype, seed):
    """8192 codes, at positions that need several strips; and with the codes last."""
    check(make("contiguous", (1, 8192, 4, 8), dtype), 1 / 16, hard, 1, "triton", seed)
    check(make("contiguous", (16, 8192), dtype), 1 / 16, hard, 1, "triton", seed)
