"""gumbel_softmax against plain PyTorch in float64 with the same noise: y, KL and gradients, hard and soft, for every
dtype, dimension and memory layout; its limits in tau; and that nothing depends on threads or the batch.
"""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import profile

import dalle_kernels as dk
from accuracy import assert_accurate, mostly
from dalle_kernels.philox import gumbel_noise
from statistics_for_tests import REJECT, frequencies_p

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "strided", "offset", "classes last"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: on a busy machine the yardsticks' threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def backend():
    """For tests that other modules take over for backends of theirs."""
    return "cpu"


def plain_gumbel_softmax(x, seed, tau, hard, dim):
    """The yardstick, wholly in x's dtype but for the logarithms of the noise: (y, kl, index of the largest)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    noisy = x + gumbel_noise(x.shape, torch.tensor(seed), wide).to(x.dtype)
    y = (noisy / tau).softmax(dim)
    log_p = x.to(wide).log_softmax(dim)
    kl = (log_p.exp() * (log_p + math.log(x.shape[dim]))).sum(dim)
    return (y + (one_hot(noisy, dim) - y).detach() if hard else y), kl


def one_hot(x, dim):
    return torch.zeros_like(x).scatter_(dim, x.argmax(dim, keepdim=True), 1.0)


def run(function, x, grad_y, grad_kl):
    """y, kl and the gradient of function(x) -> (y, kl)."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y, kl = function(x)
    torch.autograd.backward([y, kl], [grad_y.to(y.dtype), grad_kl.to(kl.dtype)])
    return y.detach(), kl.detach(), x.grad


def check(x, tau, hard, dim, backend, seed):
    grad_y, grad_kl = torch.randn(x.shape).to(x.dtype), torch.randn(x.sum(dim).shape)
    ours = run(
        lambda x: dk.gumbel_softmax(x, tau, hard, dim=dim, seed=seed, return_kl=True, backend=backend),
        x, grad_y, grad_kl,
    )  # fmt: skip
    exact = run(lambda x: plain_gumbel_softmax(x, seed, tau, hard, dim), x.double(), grad_y, grad_kl)
    plain = run(lambda x: plain_gumbel_softmax(x, seed, tau, hard, dim), x, grad_y, grad_kl)
    assert ours[1].dtype == torch.float32
    for what, a, e, p in zip(("y", "kl", "gradient"), ours, exact, plain):
        if what == "y" and hard:
            assert_argmax(a, x, seed, dim)
        else:
            assert_accurate(a, e, p, f"{backend} gumbel_softmax {what} {x.dtype}")


def assert_argmax(y, x, seed, dim):
    """y is an exact one-hot of the largest noisy logit (of one of two that float32 cannot tell apart)."""
    noisy = x.double() + gumbel_noise(x.shape, torch.tensor(seed), torch.float64)
    assert ((y == 0) | (y == 1)).all() and (y.sum(dim) == 1).all()
    short = noisy.amax(dim) - (noisy * y).sum(dim)
    assert short.max() < 1e-6 * noisy.abs().max(), f"a value {short.max():.3g} below the largest was taken"


def classes_last(x):
    """The same numbers with dim 1 contiguous: channels_last."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make(layout, shape, dtype, scale=2.0):
    if layout == "contiguous":
        return (torch.randn(shape) * scale).to(dtype)
    if layout == "transposed":
        return (torch.randn(shape[::-1]) * scale).to(dtype).permute(*range(len(shape))[::-1])
    if layout == "classes last":  # of dim 1
        return classes_last(torch.randn(shape) * scale).to(dtype)
    if layout == "strided":
        return (torch.randn(*shape[:-1], 2 * shape[-1]) * scale).to(dtype)[..., ::2]
    storage = torch.full([n + 2 for n in shape], torch.nan, dtype=dtype)  # NaN all around the view
    view = storage[(slice(1, -1),) * len(shape)]
    return view.copy_(torch.randn(shape) * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(("shape", "dim"), [((16, 65, 16, 8), 1), ((2000, 130), -1), ((8, 50, 17, 15), 1)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_matches_float64(backend, shape, dim, hard, dtype, seed):
    for tau in (1 / 16, 1.0, 5.0):
        check(make("contiguous", shape, dtype), tau, hard, dim, backend, seed)


@settings(deadline=None, max_examples=60)
@given(
    dims=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    classes=st.sampled_from([1, 2, 3, 15, 16, 17, 31, 64, 65, 100, 255, 300, 1025]),
    data=st.data(),
    hard=st.booleans(),
    tau=st.floats(0.05, 20),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape_dim_and_layout(dims, classes, data, hard, tau, dtype, layout):
    dim = data.draw(st.integers(0, len(dims)), label="dim")
    while math.prod(dims) > 60:  # of positions: enough to look at
        dims[dims.index(max(dims))] //= 2
    shape = [*dims[:dim], classes, *dims[dim:]]
    # The largest error over a few positions is chance, over thousands it is a property.
    shape = [max(1, 2000 // math.prod(dims)), *shape]
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    key = int(torch.randint(-(2**63), 2**63 - 1, ()))
    mostly(lambda: check(make(layout, shape, dtype), tau, hard, dim + 1, "cpu", key))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_large_logits(hard, offset, seed):
    check(torch.randn(40, 70, 50) * 30 + offset, 0.5, hard, 1, "cpu", seed)
    check((torch.randn(2000, 70) * 30 + offset).bfloat16(), 0.5, hard, 1, "cpu", seed)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("shape", [(8, 70), (8, 70, 1), (1, 70, 8), (1, 3, 8)], ids=str)
def test_masked_and_broken_rows(shape, hard, backend, seed):
    """-inf forbids a class and hurts nothing else; NaN, +inf and only -inf give NaN, as in the reference."""
    rows = torch.randn(8, shape[1])
    rows[0, 1:] = -torch.inf
    rows[1, :-1] = -torch.inf
    rows[2, ::2] = -torch.inf
    rows[3, 2] = -torch.inf
    broken = [4, 5, 6]
    rows[4, 1], rows[5, 2], rows[6] = torch.nan, torch.inf, -torch.inf
    x = rows.T.reshape(1, shape[1], 8) if shape[0] == 1 else rows.view(shape)
    grad_y, grad_kl = torch.randn(x.shape), torch.randn(8).view(x.sum(1).shape)
    results = [
        run(
            lambda x, b=name: dk.gumbel_softmax(x, 0.7, hard, dim=1, seed=seed, return_kl=True, backend=b),
            x, grad_y, grad_kl,
        )
        for name in (backend, "reference")
    ]  # fmt: skip
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    y, kl, grad = results[0]
    position = [i for i in range(8) if i not in broken]
    good = [t.movedim(1, -1).reshape(8, shape[1])[position] for t in (y, grad)]
    assert all(torch.isfinite(t).all() for t in good) and torch.isfinite(kl.flatten()[position]).all()
    masked = rows[position] == -torch.inf
    assert masked.any() and all((t[masked] == 0).all() for t in good)
    assert kl.flatten()[0].item() == pytest.approx(math.log(shape[1])), "one class left: KL is log of their number"


def test_padding_of_the_logits_is_never_read(backend, seed):
    """NaN may lie in the storage around a view (offset layout); the result is that of a copy."""
    x = make("offset", (3, 33, 5), torch.float32)
    for dim in range(3):
        ours = dk.gumbel_softmax(x, dim=dim, seed=seed, backend=backend)
        assert torch.equal(ours, dk.gumbel_softmax(x.contiguous(), dim=dim, seed=seed, backend=backend))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(("shape", "dim"), [((5, 300, 3, 7), 1), ((70, 300), 1)], ids=str)
def test_bits_do_not_depend_on_threads_or_later_batch_entries(shape, dim, hard, seed):
    x, grad = torch.randn(2, *shape)

    def outputs(x, grad):
        kl_grad = torch.ones(x.sum(dim).shape)
        return run(
            lambda x: dk.gumbel_softmax(x, 0.5, hard, dim=dim, seed=seed, return_kl=True, backend="cpu"),
            x, grad, kl_grad,
        )  # fmt: skip

    whole = outputs(x, grad)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            for count in (shape[0], 1):  # noise counts elements in C order, so the first entries keep theirs
                for a, b in zip(outputs(x[:count], grad[:count]), whole):
                    assert torch.equal(a, b[:count])
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_follows_the_shape_not_the_strides(layout, backend, seed):
    x = make(layout, (4, 19, 6), torch.float32)
    for dim in range(3):
        ours = dk.gumbel_softmax(x, dim=dim, seed=seed, backend=backend)
        torch.testing.assert_close(ours, dk.gumbel_softmax(x, dim=dim, seed=seed, backend="reference"))


@pytest.mark.parametrize("return_kl", [False, True])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_last_in_memory_give_the_same_bits(dtype, hard, return_kl, seed):
    """And results in the logits' layout, whichever that of the gradient is."""

    def outputs(x, grad):
        x = x.detach().requires_grad_()
        y, kl = dk.gumbel_softmax(x, 0.7, hard, dim=1, seed=seed, return_kl=True, backend="cpu")
        (gradient,) = torch.autograd.grad([y, kl][: 1 + return_kl], x, [grad, kl.detach()][: 1 + return_kl])
        return y.detach(), kl.detach(), gradient

    for shape in [(2, 64, 8, 8), (2, 300, 5, 7), (1, 1000, 3, 5, 9), (3, 16, 1, 5), (3, 5, 70), (2, 1, 3)]:
        x, grad = torch.randn(2, *shape).to(dtype).unbind(0)
        x[0, -1, ..., -1] = torch.nan
        x[-1, 0] = -torch.inf
        for other in (grad, classes_last(grad), grad[:1, :1].expand(shape)):
            for a, b in zip(outputs(classes_last(x), other), outputs(x, other.contiguous()), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
                assert a.dim() < len(shape) or a.stride() == classes_last(x).stride()


def test_soft_and_hard_choose_the_same(backend, seed):
    x = torch.randn(4, 50, 6)
    soft, hard = (dk.gumbel_softmax(x, 0.5, hard, dim=1, seed=seed, backend=backend) for hard in (False, True))
    assert torch.equal(hard, one_hot(soft, 1))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_small_tau_draws_from_the_distribution(backend, seed):
    """Jang et al. 2017: as tau falls, samples become one-hot with the frequencies softmax(logits)."""
    draws, logits = 40_000, torch.randn(11) * 1.5
    y = dk.gumbel_softmax(logits.expand(draws, 11), 1e-3, seed=seed, backend=backend)
    # Below 0.99 only if the largest leads by less than tau log 990: below 0.7 % of draws; 2 % are 30 sigma from that.
    assert (y.amax(1) > 0.99).double().mean() > 0.98
    assert frequencies_p(torch.bincount(y.argmax(1), minlength=11), logits.double().softmax(0)) > REJECT


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_large_tau_is_uniform(backend, seed):
    y = dk.gumbel_softmax(torch.randn(500, 64), 1e5, seed=seed, backend=backend)
    assert (y * 64 - 1).abs().max() < 40 / 1e5  # no logit plus noise is farther than 40 from another


def test_kl_of_the_uniform_and_of_a_certain_choice(backend, seed):
    _, kl = dk.gumbel_softmax(torch.full((3, 200), 7.0), return_kl=True, backend=backend)
    assert kl.abs().max() < 1e-6
    certain = torch.zeros(3, 200)
    certain[:, 5] = 500.0
    _, kl = dk.gumbel_softmax(certain, return_kl=True, backend=backend)
    torch.testing.assert_close(kl, torch.full((3,), math.log(200)))


def test_gradients_of_the_reference_by_finite_differences(seed):
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def soft(x):
        return dk.gumbel_softmax(x, 0.8, dim=1, seed=seed, return_kl=True)

    torch.autograd.gradcheck(soft, x)
    torch.autograd.gradgradcheck(soft, x)
    grad = torch.randn(2, 5, 3, dtype=torch.float64)
    hard = dk.gumbel_softmax(x, 0.8, True, dim=1, seed=seed)
    assert torch.equal(hard, one_hot(hard, 1))
    expected = torch.autograd.grad(soft(x)[0], x, grad)
    torch.testing.assert_close(torch.autograd.grad(hard, x, grad), expected, rtol=1e-12, atol=1e-12)


def test_kl_alone_and_y_alone_have_their_gradients(backend, seed):
    for which in (0, 1):
        grads = []
        for name in (backend, "reference"):
            x = torch.linspace(-2, 3, 4 * 30).view(4, 30).requires_grad_()
            out = dk.gumbel_softmax(x, 0.6, seed=seed, return_kl=True, backend=name)[which]
            grads.append(torch.autograd.grad((out * torch.arange(1, 1 + out.shape[-1])).sum(), x)[0])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_seeds(seed):
    x = torch.randn(3, 40)
    a = dk.gumbel_softmax(x, seed=7)
    assert torch.equal(a, dk.gumbel_softmax(x, seed=torch.tensor(7)))
    assert not torch.equal(a, dk.gumbel_softmax(x, seed=-7))
    torch.manual_seed(seed)
    b = dk.gumbel_softmax(x)
    assert not torch.equal(b, dk.gumbel_softmax(x))
    torch.manual_seed(seed)
    assert torch.equal(b, dk.gumbel_softmax(x)), "torch's generator decides where no seed is given"


def test_positional_order_is_that_of_torch(seed):
    x = torch.randn(3, 40, 2)
    ours = dk.gumbel_softmax(x, 0.5, True, 1e-10, 1)
    theirs = torch.nn.functional.gumbel_softmax(x, 0.5, True, 1e-10, 1)
    assert torch.equal(ours.sum(1), theirs.sum(1)) and (ours.sum(1) == 1).all()


def test_forward_and_backward_allocate_two_buffers(seed):
    logits = torch.randn(2, 512, 16, 16)
    for hard, last in itertools.product((False, True), (False, True)):
        x = (classes_last(logits) if last else logits.clone()).requires_grad_()
        with profile(profile_memory=True) as record:
            y, _ = dk.gumbel_softmax(x, 1.0, hard, dim=1, return_kl=True, backend="cpu")
            torch.autograd.grad(y, x, x.detach())
        sizes = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        assert sizes and sum(size for size in sizes if size > x.nbytes // 2) <= 2 * x.nbytes


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
def test_large_outputs_ask_for_huge_pages(seed):
    x = torch.randn(1, 8192, 32, 40, requires_grad=True)  # 40 MiB: malloc maps blocks this large anew
    y = dk.gumbel_softmax(x, dim=1, backend="cpu")
    for output in (y, *torch.autograd.grad(y, x, x.detach())):
        middle, inside = output.data_ptr() + output.nbytes // 2, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(match[1], 16) <= middle < int(match[2], 16)
            elif inside and line.startswith("VmFlags:"):
                assert "hg" in line.split()
                break
        else:
            raise AssertionError("the output lies in no mapping")


def test_double_backward_is_refused(backend, seed):
    x = torch.randn(3, 10, requires_grad=True)
    (grad,) = torch.autograd.grad(dk.gumbel_softmax(x, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        grad.sum().backward()


@pytest.mark.parametrize(("shape", "dim"), [((0, 5), 1), ((2, 5, 0), 1)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty(shape, dim, backend):
    x = torch.zeros(shape, requires_grad=True)
    y, kl = dk.gumbel_softmax(x, dim=dim, return_kl=True, backend=backend)
    (y.sum() + kl.sum()).backward()
    assert y.shape == x.shape and kl.shape == x.sum(dim).shape and x.grad.shape == x.shape


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "classes last"])
@pytest.mark.parametrize("return_kl", [False, True])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_opcheck(hard, return_kl, layout, seed):
    x = make(layout, (3, 10, 4), torch.float32).requires_grad_()
    arguments = (x, torch.tensor(seed), torch.tensor(0.5), hard, 1, return_kl)
    torch.library.opcheck(torch.ops.dalle_kernels.gumbel_softmax.default, arguments)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_compiles_into_one_graph(hard, seed):
    """Once for all temperatures and seeds: annealing does not compile again."""
    torch._dynamo.reset()  # backends share the code that is compiled
    compilations = 0

    def counting(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    def step(x, tau, seed):
        y, kl = dk.gumbel_softmax(x * 2, tau, hard, dim=1, seed=seed, return_kl=True)
        return y.sin().sum() + kl.sum()

    x = torch.randn(2, 30, 4, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend=counting)
    for i in range(12):
        arguments = x, 1 - 0.05 * i, torch.tensor(i)
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert compilations <= 2
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    last = classes_last(x.detach()).requires_grad_()
    for tau, z in itertools.product((1.0, 0.7, 0.3), (x, last)):
        torch.testing.assert_close(torch.autograd.grad(compiled(z, tau, 5), z), torch.autograd.grad(step(z, tau, 5), z))
    drawn = torch.compile(lambda x: dk.gumbel_softmax(x, hard=hard), fullgraph=True, backend="aot_eager")
    assert not torch.equal(drawn(x), drawn(x)), "without a seed every call draws one, in the graph"


@pytest.mark.slow
def test_the_papers_size(seed):
    """8192 codes; and with the codes last."""
    for dtype in DTYPES:
        check(make("contiguous", (1, 8192, 16, 32), dtype), 1 / 16, False, 1, "cpu", seed)
        check(make("contiguous", (512, 8192), dtype), 1 / 16, False, 1, "cpu", seed)
    check(make("contiguous", (1, 8192, 16, 32), torch.float32), 1 / 16, True, 1, "cpu", seed)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, 0.0), {}, ValueError, "tau must be a positive, finite number; got 0.0"),
        ((X, -1.0), {}, ValueError, "got -1.0"),
        ((X, math.nan), {}, ValueError, "got nan"),
        ((X, math.inf), {}, ValueError, "got inf"),
        ((X,), {"dim": 2}, ValueError, "one of the logits' 2 dimensions; got 2"),
        ((X.sum(),), {}, ValueError, "one of the logits' 0 dimensions"),
        ((X[:, :0],), {}, ValueError, r"at least one class; the logits have shape \[2, 0\]"),
        ((X.int(),), {}, TypeError, "floating-point dtype; got torch.int32"),
        (([1.0],), {}, TypeError, "must be a tensor; got list"),
        ((X,), {"seed": 1.5}, TypeError, "seed must be an int .* got float"),
        ((X,), {"seed": 2**63}, ValueError, "seed must fit in 64 bits"),
        ((X,), {"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"got torch.int64 \[2\] on cpu"),
        ((X,), {"seed": torch.zeros((), dtype=torch.int32)}, ValueError, r"got torch.int32 \[\]"),
        ((X.double(),), {"backend": "cpu"}, NotImplementedError, "float64"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        dk.gumbel_softmax(*arguments, **options)
