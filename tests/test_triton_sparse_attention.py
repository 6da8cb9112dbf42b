"""The Triton kernels of sparse_attention, forward and backward, by the accuracy rule."""

import pytest
import torch
from test_sparse_attention import check, make, plain_attention, run
from triton_for_tests import DEVICE, DTYPES, ON_GPU, on_device  # noqa: F401

import dalle_kernels as dk
from dalle_kernels.backends.plans import plan_tensors
from dalle_kernels.backends.triton import launch
from patterns_for_tests import NAMES, every_pattern

TEXT, GRID = 21, (8, 10)  # 101 tokens: two tiles, the second with a half that is neither full nor empty
N = TEXT + GRID[0] * GRID[1]
EVERY_PATTERN = every_pattern(TEXT, GRID)
FAST = ("row", "conv-clip", "mask")  # what the others run through is in these too

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where padding rows divide 0 by 0

KERNELS = ("sparse_attention", "sparse_attention.grad_q", "sparse_attention.grad_kv")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
splits = pytest.mark.parametrize("split", [None, 1])


def randn(dtype, *, batch=4, heads=4, n=N, dim=32):
    return torch.randn(3, batch, heads, n, dim).to(dtype).unbind(0)


def plans(pattern, n, head_dim, dtype):
    """The plan, the backward plan, and the sizes of both."""
    return plan_tensors(pattern, n, DEVICE, launch.tiles(DEVICE, head_dim, dtype))


def attend(pattern, tensors, grad=None, scale=None):
    """out and lse; with the gradient of out also dq, dk and dv."""

    def attention(q, k, v):
        return dk.sparse_attention(q, k, v, pattern, scale=scale, return_lse=True, backend="triton")

    return attention(*tensors) if grad is None else run(attention, tensors, grad)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter's time goes by steps, whatever their size: few and large ones."""
    if not ON_GPU:
        for kernel in KERNELS:
            monkeypatch.setitem(launch.OVERRIDES, kernel, launch.Launch(64, 64, 4, 2))


@pytest.fixture
def tiles_of_the_table(large_tiles):
    launch.OVERRIDES.clear()


@pytest.fixture
def split_tiles(monkeypatch):
    """split_tiles(s): tiles are split after s entries."""

    def set_split(split):
        if split is not None:
            monkeypatch.setattr(launch, "SPLIT", split)

    return set_split


@dtypes
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_matches_float64(name, dtype, seed):
    check(EVERY_PATTERN[name], *randn(dtype), "triton")


@dtypes
@pytest.mark.parametrize("dim", [40, 128, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (32, 64, 127))])
def test_head_dims(dim, dtype, tiles_of_the_table, seed):
    check(EVERY_PATTERN["row"], *randn(dtype, dim=dim), "triton")


def test_tiny_head_dims(seed):
    """In float32, of so few elements, plain PyTorch's sums are nearly exact: a tolerance."""
    mask = EVERY_PATTERN["row"].dense()
    for dim in (1, 3, 16):
        tensors, grad = randn(torch.float32, batch=1, heads=2, dim=dim), torch.randn(1, 2, N, dim)
        exact = run(lambda *x: plain_attention(*x, mask, x[0].shape[-1] ** -0.5), [x.double() for x in tensors], grad)
        for a, e in zip(attend(EVERY_PATTERN["row"], tensors, grad), exact):
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@dtypes
@pytest.mark.parametrize("layout", ["bnhd", "offset", pytest.param("qkv", marks=pytest.mark.slow)])
def test_layouts(layout, dtype, seed):
    """Heads beside each other, fused projections, and views with NaN all around."""
    tensors = make(layout, 4, 4, N, 48, dtype)
    check(EVERY_PATTERN["column"], *tensors, "triton")
    if layout == "bnhd":
        assert attend(EVERY_PATTERN["column"], tensors)[0].stride() == tensors[0].stride()


@dtypes
def test_an_expanded_gradient(dtype, seed):
    """As the backward of a sum gives it, with strides of 0."""
    tensors = randn(dtype, batch=1)
    grad = torch.randn(32).to(dtype).expand(1, 4, N, 32)
    for a, b in zip(*(attend(EVERY_PATTERN["row"], tensors, g) for g in (grad, grad.contiguous()))):
        assert torch.equal(a, b)


@dtypes
@pytest.mark.parametrize("n", [1, 65, *(pytest.param(n, marks=pytest.mark.slow) for n in (15, 64, 90))])
def test_shorter_sequences(n, dtype, seed):
    storage = torch.full((3, 4, 4, N, 32), float("nan"), dtype=dtype)  # nobody looks beyond n
    storage[..., :n, :] = torch.randn(3, 4, 4, n, 32)
    q, k, v = storage[..., :n, :]
    if n > 1:
        check(EVERY_PATTERN["column"], q, k, v, "triton")
    else:
        grad = torch.randn(4, 4, 1, 32).to(dtype)
        out, _, grad_q, grad_k, grad_v = attend(EVERY_PATTERN["column"], (q, k, v), grad)
        assert torch.equal(out, v) and not grad_q.any() and not grad_k.any()
        torch.testing.assert_close(grad_v, grad, rtol=2 * torch.finfo(dtype).eps, atol=0)


@dtypes
def test_split_tiles(dtype, split_tiles, seed):
    """Some parts of a tile hold no key that some of its rows see."""
    split_tiles(1)
    *_, sizes = plans(EVERY_PATTERN["mask"], N, 40, dtype)
    assert sizes[5] and sizes[11], "both plans have split tiles"
    check(EVERY_PATTERN["mask"], *randn(dtype, dim=40), "triton")


@dtypes
@pytest.mark.parametrize("factor", [40.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_large_logits(factor, dtype, split_tiles, seed):
    """lse is large then, and so is its rounding error."""
    q, k, v = randn(torch.float32)
    split_tiles(1)
    check(EVERY_PATTERN["row"], (q * factor).to(dtype), k.to(dtype), v.to(dtype), "triton")


@dtypes
@pytest.mark.parametrize("scale", [-0.2, *(pytest.param(scale, marks=pytest.mark.slow) for scale in (0.0, 0.37))])
def test_any_scale(scale, dtype, seed):
    check(EVERY_PATTERN["row"], *randn(dtype, n=90), "triton", scale=scale)


@splits
@dtypes
@pytest.mark.parametrize("name", ["mask", pytest.param("conv-clip", marks=pytest.mark.slow)])
def test_hidden_pairs_change_no_bit(name, dtype, split, split_tiles, seed):
    """Whatever finite values lie at a key, what queries give that do not see it stays as it is, forward and backward;
    and whatever lies at a query, the gradients of keys that it does not see.
    """
    split_tiles(split)
    pattern = EVERY_PATTERN[name]
    tensors = torch.randn(4, 1, 2, N, 48).to(dtype)
    token = int(torch.randint(1, N - 1, ()))
    before = attend(pattern, tensors[:3], tensors[3])
    big = 6e4 if dtype == torch.float16 else 1e30
    for changed, results, blind in (
        ((1, 2), (0, 1, 2), ~pattern.dense()[:, token]),
        ((0, 3), (3, 4), ~pattern.dense()[token]),
    ):
        other = tensors.clone()
        other[changed[0], :, :, token], other[changed[1], :, :, token] = big, -big
        after = attend(pattern, other[:3], other[3])
        for i in results:
            assert torch.equal(after[i][:, :, blind], before[i][:, :, blind])
        assert not all(torch.equal(after[i], before[i]) for i in results)


@splits
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "grad"])
def test_nan_shows_where_it_is_seen(which, split, split_tiles, seed):
    """A diverged model must not look healthy: every query that sees a NaN is NaN, and so is its gradient."""
    split_tiles(split)
    pattern = EVERY_PATTERN["row"]
    for dtype in DTYPES:
        tensors = torch.randn(4, 1, 2, N, 32).to(dtype)
        tensors[which, 0, 0, 10] = torch.nan
        seen = torch.arange(N) == 10 if which in (0, 3) else pattern.dense()[:, 10]
        out, lse, *grads = attend(pattern, tensors[:3], tensors[3])
        assert grads[0].isnan().any(-1)[0, 0, seen].all()
        assert which == 3 or out.isnan().any(-1)[0, 0, seen].all()
        assert which > 1 or torch.equal(lse[0, 0].isnan(), seen)  # the values have no part in lse
        assert not any(result[0, 1].isnan().any() for result in (out, lse, *grads))


@splits
@dtypes
def test_bits_depend_on_neither_run_nor_batch(dtype, split, split_tiles, seed):
    split_tiles(split)
    pattern = EVERY_PATTERN["corner_conv"]
    tensors = torch.randn(4, 3, 2, N, 64).to(dtype)
    expected = attend(pattern, tensors[:3], tensors[3])
    for batch, heads in ((slice(None), slice(None)), (slice(1, 2), slice(1, None))):
        part = tensors[:, batch, heads]
        for a, b in zip(attend(pattern, part[:3], part[3]), expected):
            assert torch.equal(a, b[batch, heads])


def test_empty_batch():
    q = torch.randn(0, 4, 9, 32)
    assert [x.shape[0] for x in attend(dk.AttentionPattern.row(4, (3, 3)), (q, q, q), q)] == [0] * 5


@pytest.mark.parametrize("name", ["row", "conv"])
@pytest.mark.slow
def test_the_papers_size(name, tiles_of_the_table, seed):
    """Work items share tiles here without being told to."""
    pattern = getattr(dk.AttentionPattern, name)(256, (32, 32))
    *_, sizes = plans(pattern, 1280, 64, torch.float16)
    assert sizes[11], "the keys' plan has split tiles"
    check(pattern, *randn(torch.float16, batch=1, heads=2, n=1280, dim=64), "triton")


@pytest.mark.parametrize("layout", ["bhnd", "qkv"])
def test_opcheck(layout, seed):
    q, k, v = (x.requires_grad_() for x in make(layout, 1, 2, 17, 32, torch.float32))
    arguments = q, k, v, *plans(dk.AttentionPattern.column(5, (3, 4)), 17, 32, torch.float32), 0.2
    torch.library.opcheck(torch.ops.dalle_kernels_triton.sparse_attention.default, arguments)


def test_compiles_into_one_graph(seed):
    pattern = every_pattern(6, (4, 5))["mask"]

    def step(q, k, v):
        return dk.sparse_attention(q * 2, k, v, pattern, backend="triton").sin()

    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 26, 32).unbind(0))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (26, 20, 13):
        part = [x[:, :, :n] for x in (q, k, v)]
        ours = torch.autograd.grad(compiled(*part).sum(), (q, k, v))
        expected = torch.autograd.grad(step(*part).sum(), (q, k, v))
        for a, b in zip(ours, expected):
            torch.testing.assert_close(a, b)


def test_double_backward_is_refused(seed):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 9, 32).unbind(0))
    out = dk.sparse_attention(q, k, v, dk.AttentionPattern.row(3, (2, 3)), backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        grad.sum().backward()


def test_other_cuts_give_the_same(monkeypatch, seed):
    """Whatever the table says: tiles of other shapes, which plans and kernels agree on."""
    tensors, grad = randn(torch.float32, batch=1), torch.randn(1, 4, N, 32)
    expected = attend(EVERY_PATTERN["conv-wrap"], tensors, grad)
    for rows, columns in ((32, 16), (128, 32)):
        for kernel in KERNELS:
            monkeypatch.setitem(launch.OVERRIDES, kernel, launch.Launch(rows, columns, 4, 1))
        for a, b in zip(attend(EVERY_PATTERN["conv-wrap"], tensors, grad), expected):
            torch.testing.assert_close(a, b)
