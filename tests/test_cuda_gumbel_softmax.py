"""The CUDA kernels of gumbel_softmax under emulation, against plain PyTorch in float64 with the same noise; and that
the bits depend on neither the device's generation nor the order in which blocks run.
"""

import math

import pytest
import torch
from cuda_emulation import emulated
from test_gumbel_softmax import DTYPES, LAYOUTS, assert_argmax, make, one_hot, plain_gumbel_softmax, run

from accuracy import assert_accurate
from dalle_kernels import philox
from dalle_kernels.backends.reference.gumbel_softmax import gumbel_softmax as reference


def forward(x, key, tau, hard, dim, return_kl=True, **options):
    y, kl, stats = emulated.run(
        "gumbel_softmax", x, torch.tensor(key), torch.tensor(tau), hard, dim, return_kl, **options
    )
    return y, kl, stats


def backward(x, key, tau, hard, dim, grad_y, grad_kl, y, kl, stats, **options):
    """With what autograd stores: y unless hard, logits if hard or with a gradient of the KL."""
    with_kl = grad_kl is not None
    return emulated.run(
        "gumbel_softmax_backward", grad_y, grad_kl, None if hard else y, x if hard or with_kl else None,
        kl if with_kl else None, stats if with_kl else None, torch.tensor(key), torch.tensor(tau), hard, dim, **options,
    )  # fmt: skip


def gradients_for(x, dim):
    return torch.randn(x.shape).to(x.dtype), torch.randn(x.sum(dim).shape)


def outputs(x, key, tau, hard, dim, grad_y, grad_kl, **options):
    """y, KL, their gradient together, and that of y alone."""
    y, kl, stats = forward(x, key, tau, hard, dim, **options)
    grads = [backward(x, key, tau, hard, dim, grad_y, g, y, kl, stats, **options) for g in (grad_kl, None)]
    return y, kl, *grads


def random_key():
    return int(torch.randint(-(2**63), 2**63 - 1, ()))


def check(x, tau, hard, dim):
    key, (grad_y, grad_kl) = random_key(), gradients_for(x, dim)
    ours = outputs(x, key, tau, hard, dim, grad_y, grad_kl)
    both = [grad_kl, torch.zeros_like(grad_kl)]
    for x_of_dtype in (x.double(), x):
        y, kl, grad = run(lambda x: plain_gumbel_softmax(x, key, tau, hard, dim), x_of_dtype, grad_y, both[0])
        *_, grad_of_y = run(lambda x: plain_gumbel_softmax(x, key, tau, hard, dim), x_of_dtype, grad_y, both[1])
        if x_of_dtype.dtype == torch.float64:
            exact = y, kl, grad, grad_of_y
        else:
            plain = y, kl, grad, grad_of_y
    assert ours[1].dtype == torch.float32
    for what, a, e, p in zip(("y", "kl", "gradient", "gradient of y"), ours, exact, plain):
        if what == "y" and hard:
            assert_argmax(a, x, key, dim)
        else:
            assert_accurate(a, e, p, f"cuda gumbel_softmax {what} {x.dtype}")


# The largest error over a few positions is chance, over many it is a property.
SHAPES = [
    ((500, 65), 1),
    ((500, 3), 1),
    ((400, 200), 1),
    ((2, 100, 400), 1),
    ((400, 20, 2), 1),
    ((300, 33, 3), 1),
    ((30, 50, 31), 1),
    ((30, 17, 33), 1),
    ((1, 400, 20, 16), 1),
    ((60, 20, 50), 0),
    ((3, 5, 300), 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_matches_float64(shape, dim, hard, dtype, seed):
    check(make("contiguous", shape, dtype), (1 / 16, 1.0)[random_key() % 2], hard, dim)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_one_class(hard, seed):
    for shape, dim in (((5, 1), 1), ((1, 37), 0), ((2, 1, 3), 1)):
        x = torch.randn(shape)
        y, kl, grad, _ = outputs(x, random_key(), 0.5, hard, dim, *gradients_for(x, dim))
        assert (y == 1).all() and (kl == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_dims_and_tau(layout, seed):
    """Noise follows the shape, whatever the strides; storage around a view holds NaN."""
    x = make(layout, (30, 19, 40), torch.float32)
    for dim in range(3):
        for hard in (False, True):
            check(x, 5.0, hard, dim)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_large_logits(hard, offset, seed):
    check(torch.randn(8, 70, 200) * 30 + offset, 0.5, hard, 1)
    check((torch.randn(500, 70) * 30 + offset).bfloat16(), 0.5, hard, 1)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("shape", [(8, 70), (1, 70, 8), (1, 70, 9), (1, 3, 8)], ids=str)
def test_masked_and_broken_rows(shape, hard, seed):
    """-inf forbids a class and hurts nothing else; NaN, +inf and only -inf give NaN, as in the reference."""
    classes, positions = shape[1], math.prod(shape) // shape[1]
    rows = torch.randn(positions, classes)
    rows[0, 1:] = -torch.inf
    rows[1, :-1] = -torch.inf
    rows[2, ::2] = -torch.inf
    rows[3, 2] = -torch.inf
    rows[4, 1], rows[5, 2], rows[6] = torch.nan, torch.inf, -torch.inf
    x = rows.T.reshape(shape) if shape[0] == 1 else rows
    key, (grad_y, grad_kl) = random_key(), gradients_for(x, 1)
    ours = outputs(x, key, 0.7, hard, 1, grad_y, grad_kl)
    function = lambda x: reference(x, torch.tensor(key), torch.tensor(0.7), hard, 1, True)  # noqa: E731
    expected = run(function, x, grad_y, grad_kl)
    for a, e in zip(ours, expected):
        torch.testing.assert_close(a, e, equal_nan=True, rtol=1e-5, atol=1e-5)
    y, _, grad, _ = (t.T if t.dim() == 2 and shape[0] == 1 else t for t in ours)
    good = [i for i in range(positions) if i not in (4, 5, 6)]
    of_good = [t.movedim(1, -1).reshape(positions, classes)[good] for t in (y, grad)]
    assert all((t[rows[good] == -torch.inf] == 0).all() for t in of_good)


def test_the_first_of_equals_is_taken(seed):
    """Noise of at most 23 vanishes beside 1e10, so that the largest logits are equal."""
    x = torch.zeros(6, 3000, 4)
    first = torch.randint(0, 2000, (6, 4))
    for offset in (0, 1, 33, 800):
        x.scatter_(1, (first + offset)[:, None], 1e10)
    for shape, dim in (((6, 3000, 4), 1), ((24, 3000), 1)):
        logits = x if len(shape) == 3 else x.movedim(1, 2).reshape(shape)
        y, _, _ = forward(logits, random_key(), 1.0, True, dim, return_kl=False)
        assert torch.equal(y.argmax(1).flatten(), first.flatten()) and (y.sum(1) == 1).all()


def test_noise(seed):
    """Where logits are 0 and tau is 1, log y is the noise but for a constant."""
    for shape, dim in (((40, 50), 1), ((3, 100, 33), 1), ((70, 2, 3), 0)):
        key = random_key()
        noise = philox.gumbel_noise(shape, torch.tensor(key), torch.float64)
        y, _, _ = forward(torch.zeros(shape), key, 1.0, False, dim, return_kl=False)
        assert (y.double().log() - noise.log_softmax(dim)).abs().max() < 2e-6


@pytest.mark.parametrize("key", [0, -1, 7, 0x299F31D0A4093822])
def test_seeds_use_all_64_bits(key):
    noise = philox.gumbel_noise((5, 30), torch.tensor(key), torch.float64)
    y, _, _ = forward(torch.zeros(5, 30), key, 1.0, False, 1, return_kl=False)
    assert (y.double().log() - noise.log_softmax(1)).abs().max() < 2e-6


# Several chunks of classes: clusters from capability 90 on, one block that reads twice before.
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 4100, 16), 1), ((3, 20, 5), 1), ((1, 20000), 1), ((2, 5000, 7), 1)], ids=str
)
def test_same_bits_on_every_device_and_in_every_order(shape, dim, hard, seed):
    for dtype in (torch.float32, torch.bfloat16):
        x, key = torch.randn(shape).to(dtype), random_key()
        grads = gradients_for(x, dim)
        expected = outputs(x, key, 0.5, hard, dim, *grads, capability=80)
        for a, b in zip(outputs(x, key, 0.5, hard, dim, *grads, capability=90), expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(("shape", "dim"), [((5, 30, 3, 7), 1), ((7, 300), 1)], ids=str)
def test_bits_do_not_depend_on_later_batch_entries(shape, dim, hard, seed):
    x, key = torch.randn(shape), random_key()
    grad_y, grad_kl = gradients_for(x, dim)
    whole = outputs(x, key, 0.5, hard, dim, grad_y, grad_kl)
    for count in (1, 3):  # noise counts elements in C order, so the first entries keep theirs
        part = outputs(x[:count], key, 0.5, hard, dim, grad_y[:count], grad_kl[:count])
        for a, b in zip(part, whole):
            assert torch.equal(a, b[:count])


def test_soft_and_hard_choose_the_same(seed):
    x, key = torch.randn(4, 50, 6), random_key()
    soft, hard = (forward(x, key, 0.5, hard, 1)[0] for hard in (False, True))
    assert torch.equal(hard, one_hot(soft, 1))


def test_extremes_of_tau(seed):
    x, key = torch.randn(20, 64), random_key()
    cold, hot = (forward(x, key, tau, False, 1)[0] for tau in (1e-30, 1e5))
    assert torch.equal(cold, forward(x, key, 1.0, True, 1)[0])
    assert (hot * 64 - 1).abs().max() < 40 / 1e5  # no logit plus noise is farther than 40 from another


def test_kl_of_the_uniform_and_of_a_certain_choice(seed):
    _, kl, stats = forward(torch.full((3, 200), 7.0), random_key(), 1.0, False, 1)
    assert kl.abs().max() < 1e-6 and torch.equal(stats, torch.tensor([7.0, 200.0])[:, None].expand(2, 3))
    certain = torch.zeros(3, 200)
    certain[:, 5] = 500.0
    _, kl, _ = forward(certain, random_key(), 1.0, False, 1)
    torch.testing.assert_close(kl, torch.full((3,), math.log(200)))


def test_without_kl_nothing_of_it_is_made(seed):
    x, key = torch.randn(4, 30), random_key()
    for hard in (False, True):
        y, kl, stats = forward(x, key, 1.0, hard, 1, return_kl=False)
        assert kl.shape == stats.shape == (0,)
        assert torch.equal(y, forward(x, key, 1.0, hard, 1)[0])


@pytest.mark.parametrize(("shape", "dim"), [((0, 5), 1), ((2, 5, 0), 1)], ids=str)
def test_empty(shape, dim):
    x = torch.zeros(shape)
    y, kl, grad, _ = outputs(x, 1, 1.0, False, dim, x, x.sum(dim))
    assert y.shape == grad.shape == x.shape and kl.shape == x.sum(dim).shape


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_papers_vocabulary(dtype, seed):
    """8192 codes, at positions that need several strips; and with the codes last."""
    for hard in (False, True):
        check(make("contiguous", (2, 8192, 5, 8), dtype), 1 / 16, hard, 1)
        check(make("contiguous", (64, 8192), dtype), 1 / 16, hard, 1)
