"""The operations in PyTorch's transforms: torch.func, forward-mode derivatives, FakeTensorMode, make_fx, autocast."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import dalle_kernels as dk
from dalle_kernels import backends
from dalle_kernels.backends.plans import schedule_tensor

pytestmark = [
    pytest.mark.skipif(backends.cpu.problem is not None, reason="needs the compiled CPU kernels"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap calls an operation once per entry
]
TEXT = itertools.count(1)  # a test's patterns have no cached plans


def pattern():
    return dk.AttentionPattern.row(next(TEXT), (2, 3))


def attention(mask, backend=None):
    """(function of q, k and v; q, k and v)."""
    tensors = torch.randn(3, 1, 2, mask.seq_len, 8).unbind(0)
    return lambda *x: dk.sparse_attention(*x, mask, backend=backend), tensors


def relaxation(backend=None):
    """(function of logits, logits): a soft, a hard sample and the KL."""

    def relax(x):
        hard, kl = dk.gumbel_softmax(x, 0.7, True, seed=3, return_kl=True, backend=backend)
        return hard * 3 + dk.gumbel_softmax(x, 0.7, seed=3, backend=backend) + kl[:, None]

    return relax, (torch.randn(4, 5),)


OPERATIONS = {"sparse_attention": lambda backend: attention(pattern(), backend), "gumbel_softmax": relaxation}


def pairs(name):
    """An operation on the CPU kernels, the same on the reference, and tensors for both."""
    mask = pattern()
    if name == "sparse_attention":
        ours, tensors = attention(mask, "cpu")
        return ours, attention(mask, "reference")[0], tensors
    ours, tensors = relaxation("cpu")
    return ours, relaxation("reference")[0], tensors


def squares(function):
    return lambda *x: function(*x).square().sum()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPERATIONS)
def test_reverse_transforms_equal_those_of_the_reference(name, seed):
    ours, reference, x = pairs(name)
    numbers = tuple(range(len(x)))
    close(torch.func.grad(squares(ours), numbers)(*x), torch.func.grad(squares(reference), numbers)(*x))
    out, pull = torch.func.vjp(ours, *x)
    close(pull(out), torch.func.vjp(reference, *x)[1](out))
    close(torch.func.jacrev(ours, numbers)(*x), torch.func.jacrev(reference, numbers)(*x))
    batch = [torch.stack([t, -t, t / 2]) for t in x]
    gradients = (torch.func.vmap(torch.func.grad(squares(f), numbers))(*batch) for f in (ours, reference))
    close(next(gradients), next(gradients))


def test_seeds_are_drawn_in_a_transform(seed):
    """The noise of a call without a seed is that of torch's generator, in torch.func too."""
    x = torch.randn(3, 5)
    torch.manual_seed(seed)
    expected = dk.gumbel_softmax(x, backend="cpu")
    torch.manual_seed(seed)
    assert torch.equal(torch.func.vjp(lambda x: dk.gumbel_softmax(x, backend="cpu"), x)[0], expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_and_forward_derivatives_are_refused_by_name(name, seed):
    ours, reference, x = pairs(name)
    with pytest.raises(NotImplementedError, match=f"{name} has no double backward"):
        torch.func.grad(lambda t: torch.func.grad(squares(ours))(t, *x[1:]).sum())(x[0])
    message = f"{name} has no forward-mode derivative; use backend='reference'"
    for which in range(len(x)):

        def of_one(t, function, which=which):
            return function(*x[:which], t, *x[which + 1 :])

        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(lambda t: of_one(t, ours), (x[which],), (x[which],))
        with forward_ad.dual_level():
            for leaf in (x[which], x[which].clone().requires_grad_()):
                with pytest.raises(NotImplementedError, match=message):
                    of_one(forward_ad.make_dual(leaf, torch.ones_like(leaf)), ours)
            dual = of_one(forward_ad.make_dual(x[which], torch.ones_like(x[which])), reference)
            assert forward_ad.unpack_dual(dual).tangent is not None
            torch.testing.assert_close(ours(*x), reference(*x))  # nothing to differentiate


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_derivatives_of_torch_func_are_refused_in_compiled_code(name, transform, seed):
    ours, _, x = pairs(name)
    traced = {
        "grad": lambda *x: torch.func.grad(squares(ours))(*x),
        "jvp": lambda *x: torch.func.jvp(lambda t: ours(t, *x[1:]), x[:1], x[:1])[1],
    }
    torch.compiler.reset()
    with pytest.raises(Exception, match=f"{name} has no torch.func derivative"):  # torch.compile wraps the error
        torch.compile(traced[transform], fullgraph=True, backend="eager")(*x)


def test_decode_attention_refuses_forward_mode(seed):
    cache, x = filled_cache()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="decode_attention has no derivative"):
        dk.decode_attention(forward_ad.make_dual(x, x), x, x, cache, 0)


def filled_cache(mask=None, **options):
    mask = mask or pattern()
    sizes = {"prompts": 1, "candidates": 1, "heads": 2, "head_dim": 8, "dtype": torch.float32, **options}
    cache = dk.DecodeCache([mask], **sizes)
    cache.prefill(0, *torch.randn(2, 1, 2, mask.text_len, 8).to(cache.dtype))
    return cache, torch.randn(1, 2, 8).to(cache.dtype)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fake_tensors(name, backend, seed):
    function, tensors = OPERATIONS[name](backend)
    shape = function(*tensors).shape if name == "gumbel_softmax" else tensors[0].shape
    with FakeTensorMode():
        x = [torch.randn(t.shape, requires_grad=True) for t in tensors]
        out = function(*x)
        out.sum().backward()
        assert isinstance(out, FakeTensor) and out.shape == shape
        assert all(isinstance(t.grad, FakeTensor) for t in x)
    assert not isinstance(function(*tensors), FakeTensor)


def test_a_fake_cache_leaves_no_fake_schedule(seed):
    mask = pattern()
    with FakeTensorMode():
        cache, x = filled_cache(mask)
        assert isinstance(dk.decode_attention(x, x, x, cache, 0), FakeTensor)
        cache.advance()
    assert not isinstance(schedule_tensor(mask, torch.device("cpu")), FakeTensor)
    cache, x = filled_cache(mask)
    out = dk.decode_attention(x, x, x, cache, 0)
    torch.testing.assert_close(out, dk.decode_attention(x, x, x, cache, 0, backend="reference"))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_make_fx(name, mode, seed):
    function, tensors = OPERATIONS[name]("cpu")

    def gradient(x, *others):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(squares(function)(x, *others), x)[0]

    for f in (function, gradient):
        traced = make_fx(f, tracing_mode=mode)(*tensors)
        other = [t + 1 for t in tensors]
        torch.testing.assert_close(traced(*other), f(*other))


# Autocast

Q = torch.linspace(-2, 2, 2 * 7 * 8).view(1, 2, 7, 8).sin()
ROW = dk.AttentionPattern.row(3, (2, 2))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtypes", list(itertools.product(["float32", "bfloat16", "float16"], repeat=2)))
def test_attention_under_autocast_is_that_of_its_dtype(dtypes, low, backend):
    """As that of scaled_dot_product_attention, with gradients in the dtypes of the arguments."""
    wide, other = (getattr(torch, dtype) for dtype in dtypes)
    q, k, v = (Q.roll(i, 2).to(dtype).requires_grad_() for i, dtype in enumerate((wide, wide, other)))
    with torch.autocast("cpu", low):
        out = dk.sparse_attention(q, k, v, ROW, backend=backend)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == low
    assert torch.equal(out, dk.sparse_attention(q.to(low), k.to(low), v.to(low), ROW, backend=backend))
    out.sum().backward()
    assert [x.grad.dtype for x in (q, k, v)] == [wide, wide, other]


def test_autocast_leaves_float64_and_other_devices(seed):
    x = Q.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dk.sparse_attention(x, x, x, ROW), dk.sparse_attention(x, x, x, ROW, backend="reference"))
        assert dk.sparse_attention(x, x, x, ROW).dtype == torch.float64
        meta = Q.to("meta")
        assert dk.sparse_attention(meta, meta, meta, ROW).dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert dk.sparse_attention(Q, Q, Q, ROW).dtype == torch.float32
    with pytest.raises(TypeError, match="share one floating-point dtype"):
        dk.sparse_attention(Q, Q, Q.bfloat16(), ROW)


def test_autocast_in_compiled_code():
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(lambda x: dk.sparse_attention(x, x, x, ROW), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(Q), dk.sparse_attention(Q, Q, Q, ROW))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_decode_attention_under_autocast_is_that_of_the_cache(dtype, seed):
    cache, _ = filled_cache(dtype=dtype)
    for given in (torch.float32, torch.float16):
        text, x = torch.randn(2, *cache.layer(0).prefix_k.shape).to(given), torch.randn(1, 2, 8).to(given)
        with torch.autocast("cpu", torch.bfloat16):
            cache.prefill(0, *text)
            out = dk.decode_attention(x, x, x, cache, 0)
        cache.prefill(0, *text.to(dtype))
        x = x.to(dtype)
        assert out.dtype == dtype and torch.equal(out, dk.decode_attention(x, x, x, cache, 0))


@contextlib.contextmanager
def autocast_of_cuda():
    """torch.autocast("cuda") disables itself where there is no GPU."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gumbel_softmax_under_autocast_has_the_dtype_of_pytorchs(dtype):
    """In float32 on a GPU; on a CPU autocast leaves softmax in the dtype of the logits."""
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.zeros(2, 3, dtype=dtype)
        assert dk.gumbel_softmax(x).dtype == F.gumbel_softmax(x).dtype == dtype
    with FakeTensorMode(), autocast_of_cuda():
        x = torch.zeros(2, 3, dtype=dtype, device="cuda")
        ours, theirs = dk.gumbel_softmax(x, seed=1, backend="reference"), F.gumbel_softmax(x)
        assert ours.dtype == theirs.dtype == torch.promote_types(dtype, torch.float32)
