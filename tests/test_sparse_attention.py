"""sparse_attention: threads and split tiles of the CPU kernels, torch.compile, and invalid arguments.
test_conformance.py has the requirements on every backend.
"""

import pytest
import torch

import dalle_kernels as dk
from conformance import Target, sparse_attention
from conformance.target import DTYPES, same
from dalle_kernels.backends.base import rows_contiguous
from dalle_kernels.backends.native.tiles import TILES
from dalle_kernels.backends.plans import PlanSizes, plan_tensors
from patterns_for_tests import NAMES, every_pattern

CPU = Target("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", [1, 5])
def test_split_tiles(threads, name, dtype, threads_again, seed):
    """Some splits of a tile have no key for some of its queries. Of 18 heads, 5 threads share three."""
    pattern = every_pattern(19, (9, 11))[name]
    torch.set_num_threads(threads)
    with CPU.split_after(2):
        *_, sizes = plan_tensors(pattern, pattern.seq_len, torch.device("cpu"), TILES["cpu"], 0)
        sizes = PlanSizes(*sizes[:6])
        assert sizes.partials > sizes.split_tiles > 0
        *tensors, grad = torch.randn(4, 6, 3, pattern.seq_len, 64, dtype=DTYPES[dtype])
        sparse_attention.check(CPU, pattern, tensors, grad, dtype)


@pytest.fixture
def threads_again():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_training_after_inference(seed):
    """A plan that was compiled in inference mode must work with autograd."""
    pattern = dk.AttentionPattern.column(text_len=int(torch.randint(1, 1000, ())), grid=(1, 2))
    x = torch.randn(1, 1, 3, 32)
    with torch.inference_mode():
        out = dk.sparse_attention(x, x, x, pattern)
    x.requires_grad_()
    again = dk.sparse_attention(x, x, x, pattern)
    again.sum().backward()
    assert torch.equal(out, again) and x.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "pattern",
    [
        dk.AttentionPattern.conv(40, (11, 13), kernel=5),
        dk.AttentionPattern.causal(800, (20, 20)),  # split tiles; several rounds of tiles where threads share a head
    ],
    ids=["conv", "causal"],
)
def test_bits_do_not_depend_on_batch_or_threads(pattern, dtype, seed):
    """Whether threads process heads alone or share them depends on both counts: five threads share the sixth head."""
    tensors = torch.randn(4, 3, 2, pattern.seq_len, 40).to(DTYPES[dtype])

    def outputs(threads, part):
        torch.set_num_threads(threads)
        *some, grad = (x[part] for x in tensors)
        return sparse_attention.attend(CPU, pattern, some, grad)

    before = torch.get_num_threads()
    try:
        whole = outputs(1, slice(None))
        for threads in (2, 3, 5):
            same(outputs(threads, slice(None)), whole)
        one = (slice(1, 2), slice(1, 2))
        for threads in (1, 2, 3, 5):
            same(outputs(threads, one), [x[one] for x in whole])
    finally:
        torch.set_num_threads(before)


def test_gradients_of_the_reference_by_finite_differences(seed):
    pattern = dk.AttentionPattern.conv(2, (2, 2), kernel=3)
    leaves = [torch.randn(1, 1, 6, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.autograd.gradcheck(lambda *x: dk.sparse_attention(*x, pattern), leaves)
    torch.autograd.gradgradcheck(lambda *x: dk.sparse_attention(*x, pattern), leaves)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_overlapping_windows(backend, seed):
    """Shifted windows of one buffer, of which two dimensions have stride 1."""
    pattern = dk.AttentionPattern.row(4, (4, 4))
    n = pattern.seq_len
    base = torch.randn(3, 8 * n + 4)

    def windows(x):
        return x.as_strided((4, 1, n, 8), (1, 1, 8, 1), x.storage_offset())

    def outputs(copy, backend):
        leaves = base.clone().requires_grad_()
        tensors = [windows(x).contiguous() if copy else windows(x) for x in leaves]
        out = dk.sparse_attention(*tensors, pattern, backend=backend)
        return out, torch.autograd.grad(out.square().sum(), leaves)[0]

    for ours, expected in zip(outputs(False, backend), outputs(True, "reference")):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_slice_of_a_projection_is_not_copied():
    q, k, v = torch.zeros(2, 5, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
    assert all(rows_contiguous(x) is x for x in (q, k, v, q[:1].expand(4, -1, -1, -1)))


@pytest.mark.parametrize("layout", ["bhnd", "qkv"])
def test_opcheck(layout, seed):
    pattern = dk.AttentionPattern.column(5, (3, 4))
    q, k, v = (x.requires_grad_() for x in sparse_attention.make(CPU, layout, 2, 2, 17, 32, torch.float32))
    plans = plan_tensors(pattern, 17, torch.device("cpu"), TILES["cpu"], 0)
    torch.library.opcheck(torch.ops.dalle_kernels.sparse_attention.default, (q, k, v, *plans, 0.2, None, None, 0.0, 0))


@pytest.mark.slow
def test_compiles_with_inductor(seed):
    pattern = dk.AttentionPattern.row(6, (4, 5))
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 26, 32).unbind(0))
    compiled = torch.compile(lambda q, k, v: dk.sparse_attention(q, k, v, pattern).sin(), fullgraph=True)
    out = compiled(q, k, v)
    torch.testing.assert_close(out, dk.sparse_attention(q, k, v, pattern).sin())
    out.sum().backward()


ROW = dk.AttentionPattern.row(4, (2, 2))
X = torch.zeros(1, 1, 8, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X, X, "row"), TypeError, "pattern must be an AttentionPattern; got str"),
        (([1], X, X, ROW), TypeError, "must be tensors; got list, Tensor and Tensor"),
        ((X[0], X[0], X[0], ROW), ValueError, r"q must be \[B, H, M, D\].*got \[1, 8, 16\]"),
        ((X, X[:, :, :4], X, ROW), ValueError, r"\[1, 1, 4, 16\]"),
        ((X, X.double(), X, ROW), TypeError, "torch.float64"),
        ((X.to(torch.float8_e4m3fn),) * 3 + (ROW,), TypeError, "must be float32.*got torch.float8_e4m3fn"),
        ((X.int(), X.int(), X.int(), ROW), TypeError, "must be float32, bfloat16, float16 or float64"),
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
        NotImplementedError, match=r"'cpu' cannot run sparse_attention here: it supports .* not torch.float64"
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
