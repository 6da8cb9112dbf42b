"""gumbel_softmax: threads, memory and layouts of the CPU kernels, small tau, compilers, and invalid arguments. What
every backend must satisfy is in test_conformance.py.
"""

import functools
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

import dalle_kernels as dk
from conformance import Target, gumbel_softmax
from conformance.target import DTYPES, same
from dalle_kernels.philox import gumbel_noise
from statistics_for_tests import REJECT, frequencies_p

CPU = Target("cpu")


def classes_last(x):
    """The same values with dim 1 contiguous (channels_last)."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread for plain PyTorch, whose threads would mostly wait for each other on small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("shape", [(5, 300, 3, 7), (70, 300)], ids=str)
def test_bits_do_not_depend_on_threads(shape, hard, seed):
    x, grad = torch.randn(2, *shape)
    relax = functools.partial(gumbel_softmax.relax, CPU, seed=seed, hard=hard)
    whole = gumbel_softmax.run(relax, x, grad, torch.ones(x.sum(1).shape))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            for count in (shape[0], 1):  # noise indices are in C order, so the first entries keep theirs
                some = gumbel_softmax.run(relax, x[:count], grad[:count], torch.ones(x[:count].sum(1).shape))
                same(some, [part[:count] for part in whole])
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("return_kl", [False, True])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_classes_last_in_memory_give_the_same_bits(dtype, hard, return_kl, seed):
    """And results in the logits' layout, whichever that of the gradient is."""

    def outputs(x, grad):
        x = x.detach().requires_grad_()
        y, kl = dk.gumbel_softmax(x, 0.7, hard, dim=1, seed=seed, return_kl=True, backend="cpu")
        (gradient,) = torch.autograd.grad([y, kl][: 1 + return_kl], x, [grad, kl.detach()][: 1 + return_kl])
        return y.detach(), kl.detach(), gradient

    for shape in [(2, 64, 8, 8), (2, 300, 5, 7), (1, 1000, 3, 5, 9), (3, 16, 1, 5), (3, 5, 70), (2, 1, 3)]:
        x, grad = torch.randn(2, *shape).to(DTYPES[dtype]).unbind(0)
        x[0, -1, ..., -1] = torch.nan
        x[-1, 0] = -torch.inf
        for other in (grad, classes_last(grad), grad[:1, :1].expand(shape)):
            for a, b in zip(outputs(classes_last(x), other), outputs(x, other.contiguous()), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
                assert a.dim() < len(shape) or a.stride() == classes_last(x).stride()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_small_tau_draws_from_the_distribution(backend, seed):
    """Jang et al. 2017: as tau falls, samples become one-hot with the frequencies softmax(logits)."""
    draws, logits = 40_000, torch.randn(11) * 1.5
    y = dk.gumbel_softmax(logits.expand(draws, 11), 1e-3, seed=seed, backend=backend)
    # Below 0.99 only if the largest leads by less than tau log 990: under 0.7 % of samples; 2 % is 30 sigma from that.
    assert (y.amax(1) > 0.99).double().mean() > 0.98
    assert frequencies_p(torch.bincount(y.argmax(1), minlength=11), logits.double().softmax(0)) > REJECT


def test_gradients_of_the_reference_by_finite_differences(seed):
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def soft(x):
        return dk.gumbel_softmax(x, 0.8, dim=1, seed=seed, return_kl=True)

    torch.autograd.gradcheck(soft, x)
    torch.autograd.gradgradcheck(soft, x)
    grad = torch.randn(2, 5, 3, dtype=torch.float64)
    hard = dk.gumbel_softmax(x, 0.8, True, dim=1, seed=seed)
    assert torch.equal(hard, gumbel_softmax.one_hot(hard, 1))
    expected = torch.autograd.grad(soft(x)[0], x, grad)
    torch.testing.assert_close(torch.autograd.grad(hard, x, grad), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_the_gradient_of_tau(hard, shape, seed, recwarn):
    """As that of PyTorch's formula with the same noise, and as that of finite differences."""
    x, grad = torch.randn(2, 4, 7, dtype=torch.float64).unbind(0)
    tau = torch.full(shape, 0.6, dtype=torch.float64, requires_grad=True)
    noisy = x + gumbel_noise(x.shape, torch.tensor(seed), torch.float64)

    def soft(tau):
        return dk.gumbel_softmax(x, tau, seed=seed, return_kl=True)

    (expected,) = torch.autograd.grad((noisy / tau).softmax(-1), tau, grad)
    y, _ = dk.gumbel_softmax(x, tau, hard, seed=seed, return_kl=True)
    torch.testing.assert_close(torch.autograd.grad(y, tau, grad)[0], expected, rtol=1e-12, atol=1e-12)
    torch.autograd.gradcheck(soft, tau)
    torch.autograd.gradcheck(soft, tau, check_forward_ad=True, check_backward_ad=False)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        low = tau.detach().float().requires_grad_()
        y = dk.gumbel_softmax(x.to(dtype), low, hard, seed=seed)
        close = torch.autograd.grad(y, low, grad.to(dtype))[0].double()
        torch.testing.assert_close(close, expected, rtol=tolerance, atol=tolerance)
        assert y.dtype == dtype and low.shape == shape
        with torch.no_grad():  # the kernels run where no gradient is needed
            torch.testing.assert_close(dk.gumbel_softmax(x.to(dtype), low, hard, seed=seed), y.detach())
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_kernels_refuse_a_gradient_of_tau():
    tau = torch.tensor(0.5, requires_grad=True)
    message = "backend 'cpu' cannot run gumbel_softmax here: it has no gradient of tau; use 'reference', or"
    with pytest.raises(NotImplementedError, match=message):
        dk.gumbel_softmax(X, tau, backend="cpu")
    with pytest.raises(NotImplementedError, match=message), dk.use_backend("cpu"):
        dk.gumbel_softmax(X, tau)
    with dk.use_backend("reference"):
        assert dk.gumbel_softmax(X, tau).requires_grad


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
    x = torch.randn(1, 8192, 32, 40, requires_grad=True)  # 40 MiB: malloc maps such blocks on every call
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


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "classes last"])
@pytest.mark.parametrize("return_kl", [False, True])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_opcheck(hard, return_kl, layout, seed):
    x = gumbel_softmax.make(CPU, layout, (3, 10, 4), torch.float32).requires_grad_()
    arguments = (x, torch.tensor(seed), torch.tensor(0.5), hard, 1, return_kl)
    torch.library.opcheck(torch.ops.dalle_kernels.gumbel_softmax.default, arguments)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_compiles_into_one_graph(hard, seed):
    """One compilation for all temperatures and seeds: annealing does not recompile."""
    torch._dynamo.reset()  # backends share compiled code
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
        ((X.int(),), {}, TypeError, "float32, bfloat16, float16 or float64; got torch.int32"),
        ((X.to(torch.float8_e4m3fn),), {}, TypeError, "must be float32.*got torch.float8_e4m3fn"),
        ((X, torch.ones(2)), {}, ValueError, r"tau must be one number; got a tensor of shape \[2\]"),
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
