"""sparse_attention against plain PyTorch in float64: forward, backward and lse, for every pattern, dtype and memory
layout.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_kernels as dk
from accuracy import assert_accurate, mostly
from dalle_kernels.backends.native.tiles import TILES
from dalle_kernels.backends.plans import PlanSizes, plan_tensors
from patterns_for_tests import NAMES, every_pattern, split_after

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[None, 1], ids=["whole", "split"])
def split(request):
    """A tile is one work item, or every group of its keys is."""
    with split_after(request.param):
        yield request.param


def plain_attention(q, k, v, mask, scale):
    """The yardstick: softmax(q kT * scale, masked) v with matmuls in the inputs' dtype; returns (out, lse)."""
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def run(attention, tensors, grad):
    """Outputs and input gradients of attention(q, k, v) -> (out, lse)."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    out, lse = attention(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def check(pattern, q, k, v, backend, scale=None):
    """The accuracy rule on all outputs and gradients. Callers give at least 16 (batch, head) pairs: the largest error
    of one head comes from the few queries that see few keys and is chance; that of many heads is a property.
    """
    n = q.shape[2]
    used = q.shape[-1] ** -0.5 if scale is None else scale
    mask = pattern.dense()[:n, :n]
    grad = torch.randn(q.shape, dtype=q.dtype)
    ours = run(
        lambda *x: dk.sparse_attention(*x, pattern, scale=scale, return_lse=True, backend=backend), (q, k, v), grad
    )
    exact = run(lambda *x: plain_attention(*x, mask, used), [x.double() for x in (q, k, v)], grad)
    plain = run(lambda *x: plain_attention(*x, mask, used), (q, k, v), grad)
    for name, a, e, p in zip(("out", "lse", "dq", "dk", "dv"), ours, exact, plain):
        if name == "lse":
            assert a.dtype == torch.float32
            p = p.float()
        assert_accurate(a, e, p, f"{backend} sparse_attention {name} {q.dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_matches_float64(backend, name, dtype, seed):
    pattern = every_pattern(19, (9, 11))[name]
    q, k, v = torch.randn(3, 6, 3, pattern.seq_len, 64, dtype=dtype)
    check(pattern, q, k, v, backend)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 31, 32, 33, 64, 80, 127, 128]),
    text_len=st.integers(0, 70),
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["bhnd", "bnhd", "qkv", "offset"]),
    split=st.sampled_from([None, 1, 3]),
    data=st.data(),
)
def test_any_shape_and_layout(batch, heads, dim, text_len, grid, name, dtype, layout, split, data):
    pattern = every_pattern(text_len, grid)[name]
    n = data.draw(st.integers(1, pattern.seq_len), label="n")
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    batch = max(batch, 2**17 // (heads * n * dim), 16 // heads)
    with split_after(split):
        mostly(lambda: check(pattern, *make(layout, batch, heads, n, dim, dtype), "cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", [1, 5])
def test_split_tiles(threads, name, dtype, threads_again, seed):
    """Some parts of a tile hold no key that some of its queries see. Of 18 heads, 5 threads do three together."""
    pattern = every_pattern(19, (9, 11))[name]
    torch.set_num_threads(threads)
    with split_after(2):
        *_, sizes = plan_tensors(pattern, pattern.seq_len, torch.device("cpu"), TILES["cpu"])
        sizes = PlanSizes(*sizes[:6])
        assert sizes.partials > sizes.split_tiles > 0
        check(pattern, *torch.randn(3, 6, 3, pattern.seq_len, 64, dtype=dtype), "cpu")


@pytest.fixture
def threads_again():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(layout, batch, heads, n, dim, dtype):
    if layout == "bhnd":
        return torch.randn(3, batch, heads, n, dim).to(dtype).unbind(0)
    if layout == "bnhd":
        return [torch.randn(batch, n, heads, dim).to(dtype).transpose(1, 2) for _ in range(3)]
    if layout == "qkv":  # one fused projection, split by views
        return torch.randn(batch, n, 3, heads, dim).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    storage = torch.full((3, batch, heads, n + 2, dim + 3), float("nan"), dtype=dtype)  # NaN all around the view
    views = storage[..., 1:-1, 2:-1]
    views.copy_(torch.randn(views.shape))
    return views.unbind(0)


@pytest.mark.parametrize("dim", [1, 2, 3, 7])
def test_tiny_head_dims(dim, seed):
    """Gradients of dq and dk err up to 1.5 times the bound of the accuracy rule here, so this one has a tolerance."""
    pattern = dk.AttentionPattern.row(3, (2, 12))
    tensors, grad = torch.randn(3, 4, 2, 27, dim).unbind(0), torch.randn(4, 2, 27, dim)
    ours = run(lambda *x: dk.sparse_attention(*x, pattern, return_lse=True, backend="cpu"), tensors, grad)
    exact = run(lambda *x: plain_attention(*x, pattern.dense(), dim**-0.5), [x.double() for x in tensors], grad)
    for a, e in zip(ours, exact):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [5.0, 40.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(factor, dtype, split, seed):
    pattern = dk.AttentionPattern.row(32, (8, 8))
    q, k, v = torch.randn(3, 16, 2, 96, 64)
    check(pattern, (q * factor).to(dtype), k.to(dtype), v.to(dtype), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_is_used_even_when_zero_or_negative(dtype, split, seed):
    pattern = dk.AttentionPattern.causal(8, (4, 4))
    q, k, v = torch.randn(3, 16, 1, 24, 32).to(dtype)
    for scale in (0.0, 0.37, -0.37):
        check(pattern, q, k, v, "cpu", scale=scale)


def test_out_has_the_strides_of_q(seed):
    pattern = dk.AttentionPattern.row(8, (4, 4))
    q, k, v = make("bnhd", 2, 3, 24, 32, torch.float32)
    for backend in ("cpu", "reference"):
        out = dk.sparse_attention(q, k, v, pattern, backend=backend)
        assert out.stride() == q.stride()
        out.transpose(1, 2).reshape(2, 24, 96).view(-1)  # free


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_change_no_bit(name, dtype, split, seed):
    """Whatever finite values lie at a key, queries that may not see it give the same bits, forward and backward."""
    pattern = every_pattern(21, (5, 9))[name]
    n = pattern.seq_len
    q, k, v, grad = torch.randn(4, 1, 2, n, 48).to(dtype)
    hidden = int(torch.randint(1, n - 1, ()))
    blind = ~pattern.dense()[:, hidden]
    grad = grad * blind[:, None]  # gradients of queries that see the key would rightly change

    def outputs(k, v):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = dk.sparse_attention(*leaves, pattern, backend="cpu")
        out.backward(grad)
        return out[:, :, blind], leaves[0].grad[:, :, blind]

    expected = outputs(k, v)
    big = 6e4 if dtype == torch.float16 else 1e30
    k, v = k.clone(), v.clone()
    k[:, :, hidden], v[:, :, hidden] = big, -big
    for a, b in zip(outputs(k, v), expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
def test_nan_shows_where_it_is_seen(which, dtype, split, seed):
    """A diverged model must not look healthy: every query that sees a NaN is NaN, and so is its gradient."""
    pattern = dk.AttentionPattern.row(text_len=5, grid=(4, 9))
    tensors = torch.randn(3, 1, 2, pattern.seq_len, 40).to(dtype)
    tensors[which, 0, 0, 3] = torch.nan
    seen = torch.arange(pattern.seq_len) == 3 if which == 0 else pattern.dense()[:, 3]
    out, lse, grad_q, *_ = run(
        lambda *x: dk.sparse_attention(*x, pattern, return_lse=True), tensors, torch.randn(tensors.shape[1:])
    )
    broken = {"out": out.isnan().any(-1), "grad_q": grad_q.isnan().any(-1)}
    if which < 2:  # the values have no part in lse
        broken["lse"] = lse.isnan()
    for name, found in broken.items():
        assert found[0, 0, seen].all() and not found[0, 1].any(), name


def test_training_after_inference(seed):
    """The plan that inference compiled must serve autograd too."""
    pattern = dk.AttentionPattern.column(text_len=int(torch.randint(1, 1000, ())), grid=(1, 2))
    x = torch.randn(1, 1, 3, 32)
    with torch.inference_mode():
        out = dk.sparse_attention(x, x, x, pattern)
    x.requires_grad_()
    again = dk.sparse_attention(x, x, x, pattern)
    again.sum().backward()
    assert torch.equal(out, again) and x.grad is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "pattern",
    [
        dk.AttentionPattern.conv(40, (11, 13), kernel=5),
        dk.AttentionPattern.causal(800, (20, 20)),  # split tiles; several rounds of tiles where threads share a head
    ],
    ids=["conv", "causal"],
)
def test_bits_do_not_depend_on_batch_or_threads(pattern, dtype, seed):
    """A thread may do a head alone or share it, by the numbers of both; the sixth of six heads is shared by five."""
    q, k, v, grad = torch.randn(4, 3, 2, pattern.seq_len, 40).to(dtype)

    def outputs(threads, part):
        torch.set_num_threads(threads)
        leaves = [x[part].clone().requires_grad_() for x in (q, k, v)]
        out, lse = dk.sparse_attention(*leaves, pattern, return_lse=True, backend="cpu")
        out.backward(grad[part])
        return [out.detach(), lse, *(x.grad for x in leaves)]

    before = torch.get_num_threads()
    try:
        whole = outputs(1, slice(None))
        for threads in (2, 3, 5):
            for a, b in zip(outputs(threads, slice(None)), whole):
                assert torch.equal(a, b)
        one = (slice(1, 2), slice(1, 2))
        for threads in (1, 2, 3, 5):
            for a, b in zip(outputs(threads, one), whole):
                assert torch.equal(a, b[one])
    finally:
        torch.set_num_threads(before)


def test_n_of_one_copies_the_value(seed):
    q, k, v = torch.randn(3, 1, 1, 1, 32)
    out, lse = dk.sparse_attention(q, k, v, dk.AttentionPattern.row(4, (2, 2)), return_lse=True, backend="cpu")
    assert torch.equal(out, v)
    torch.testing.assert_close(lse, (q * k).sum(-1) * 32**-0.5)


def test_empty_batch():
    q = torch.randn(0, 4, 9, 32, requires_grad=True)
    out, lse = dk.sparse_attention(q, q, q, dk.AttentionPattern.row(4, (3, 3)), return_lse=True)
    out.sum().backward()
    assert out.shape == (0, 4, 9, 32) and lse.shape == (0, 4, 9) and q.grad.shape == q.shape


def test_gradients_of_the_reference_by_finite_differences(seed):
    pattern = dk.AttentionPattern.conv(2, (2, 2), kernel=3)
    leaves = [torch.randn(1, 1, 6, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.autograd.gradcheck(lambda *x: dk.sparse_attention(*x, pattern), leaves)
    torch.autograd.gradgradcheck(lambda *x: dk.sparse_attention(*x, pattern), leaves)


def test_double_backward_is_refused(seed):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 9, 32).unbind(0))
    out = dk.sparse_attention(q, k, v, dk.AttentionPattern.row(3, (2, 3)), backend="cpu")
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["bhnd", "qkv"])
def test_opcheck(layout, seed):
    pattern = dk.AttentionPattern.column(5, (3, 4))
    q, k, v = (x.requires_grad_() for x in make(layout, 2, 2, 17, 32, torch.float32))
    plans = plan_tensors(pattern, 17, torch.device("cpu"), TILES["cpu"])
    torch.library.opcheck(torch.ops.dalle_kernels.sparse_attention.default, (q, k, v, *plans, 0.2))


def test_compiles_into_one_graph(seed):
    pattern = every_pattern(6, (4, 5))["mask"]

    def step(q, k, v):
        return dk.sparse_attention(q * 2, k, v, pattern).sin()

    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 2, 26, 32).unbind(0))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (26, 20, 13):
        part = [x[:, :, :n] for x in (q, k, v)]
        ours = torch.autograd.grad(compiled(*part).sum(), (q, k, v))
        expected = torch.autograd.grad(step(*part).sum(), (q, k, v))
        for a, b in zip(ours, expected):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiles_with_inductor(seed):
    pattern = dk.AttentionPattern.row(6, (4, 5))
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 26, 32).unbind(0))
    compiled = torch.compile(lambda q, k, v: dk.sparse_attention(q, k, v, pattern).sin(), fullgraph=True)
    out = compiled(q, k, v)
    torch.testing.assert_close(out, dk.sparse_attention(q, k, v, pattern).sin())
    out.sum().backward()


@pytest.mark.slow
def test_the_papers_size(seed):
    for pattern in (
        dk.AttentionPattern.row(256, (32, 32)),
        dk.AttentionPattern.column(256, (32, 32)),
        dk.AttentionPattern.conv(256, (32, 32)),
    ):
        for dtype in DTYPES:
            q, k, v = torch.randn(3, 8, 2, 1280, 64).to(dtype)
            check(pattern, q, k, v, "cpu")


ROW = dk.AttentionPattern.row(4, (2, 2))
X = torch.zeros(1, 1, 8, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X, X, "row"), TypeError, "pattern must be an AttentionPattern; got str"),
        (([1], X, X, ROW), TypeError, "must be tensors; got list, Tensor and Tensor"),
        ((X[0], X[0], X[0], ROW), ValueError, r"one shape \[B, H, N, D\]; got \[1, 8, 16\]"),
        ((X, X[:, :, :4], X, ROW), ValueError, r"\[1, 1, 4, 16\]"),
        ((X, X.double(), X, ROW), TypeError, "torch.float64"),
        ((X.int(), X.int(), X.int(), ROW), TypeError, "floating-point"),
        ((X, X.to("meta"), X, ROW), ValueError, "one device; got cpu, meta"),
        ((torch.zeros(1, 1, 9, 16),) * 3 + (ROW,), ValueError, r"N must lie in \[1, 8\].*got 9"),
        ((X[:, :, :0],) * 3 + (ROW,), ValueError, "got 0"),
        ((X[..., :0],) * 3 + (ROW,), ValueError, "head dim must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        dk.sparse_attention(*arguments)


def test_a_forced_backend_says_why_it_cannot():
    with pytest.raises(ValueError, match="backend='gpu' is not one of"):
        dk.sparse_attention(X, X, X, ROW, backend="gpu")
    with pytest.raises(
        NotImplementedError, match=r"'cpu' cannot run sparse_attention here: it takes .* not torch.float64"
    ):
        dk.sparse_attention(X.double(), X.double(), X.double(), ROW, backend="cpu")
    wide = torch.zeros(1, 1, 8, 129)
    with pytest.raises(NotImplementedError, match="head dims up to 128, not 129"), dk.use_backend("cpu"):
        dk.sparse_attention(wide, wide, wide, ROW)
    assert dk.sparse_attention(wide, wide, wide, ROW).shape == wide.shape, "the reference takes what others cannot"


def test_exports_with_a_pattern_that_was_never_used(seed):
    module = dk.nn.SparseAttention(32, 1, every_pattern(5, (3, 4))["mask"])
    x = torch.randn(1, 17, 32)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))
