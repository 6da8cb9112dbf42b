"""The CUDA kernels of sparse_attention, backward, under emulation, against plain PyTorch in float64. `out` and `lse`
come from the forward kernel.
"""


import pytest
import torch
from cuda_emulation import emulated
from test_cuda_sparse_attention import DTYPES, randn
from test_sparse_attention import make, plain_attention, run

import dalle_kernels as dk
from accuracy import assert_accurate
from dalle_kernels.backends.plans import plan_tensor
from dalle_kernels.plan import TileShape
from patterns_for_tests import NAMES, every_pattern

TEXT, GRID = 21, (8, 10)  # 101 tokens: two tiles, the second with a part of 16 rows that is not full and an empty one
N = TEXT + GRID[0] * GRID[1]
EVERY_PATTERN = every_pattern(TEXT, GRID)
BATCH = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}  # of 4 heads each; float32 depends more on chance


def plans(pattern, n, split=None):
    """`split`: after how many entries tiles are split between work items."""
    if split is None:
        return emulated.plans(pattern, n)
    shapes = (
        (TileShape(64, 64, longest_run=1, split=split), "query"),
        (TileShape(64, 32, longest_run=1, split=split), "key"),
    )
    (plan, sizes), (backward_plan, backward_sizes) = (plan_tensor(pattern, n, torch.device("cpu"), *x) for x in shapes)
    assert n <= 64 or backward_sizes.split_tiles  # a tile of queries may need no more than one group of keys
    return plan, backward_plan, sizes + backward_sizes


def gradients(q, k, v, grad, pattern, scale=None, split=None, seed=None):
    """dq, dk and dv of the emulated kernels."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attention = plans(pattern, q.shape[2], split)
    out, lse = emulated.run("sparse_attention", q, k, v, *attention, scale)
    return emulated.run("sparse_attention_backward", grad, q, k, v, out, lse, *attention, scale, seed=seed)


def check(pattern, q, k, v, scale=None, split=None, grad=None):
    n = q.shape[2]
    grad = torch.randn(q.shape).to(q.dtype) if grad is None else grad
    mask = pattern.dense()[:n, :n]
    used = q.shape[-1] ** -0.5 if scale is None else scale
    ours = gradients(q, k, v, grad, pattern, scale, split)
    exact = run(lambda *x: plain_attention(*x, mask, used), [x.double() for x in (q, k, v)], grad)[2:]
    plain = run(lambda *x: plain_attention(*x, mask, used), (q, k, v), grad)[2:]
    for name, x, a, e, p in zip(("dq", "dk", "dv"), (q, k, v), ours, exact, plain):
        assert a.stride() == torch.empty_like(x).stride()
        assert_accurate(a, e, p, f"cuda sparse_attention {name} {x.dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matches_float64(name, dtype, seed):
    check(EVERY_PATTERN[name], *randn(dtype, n=N, dim=32 if dtype == torch.float32 else 64, batch=BATCH[dtype]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 40, 64, 127, 128])
def test_head_dims(dim, dtype, seed):
    check(EVERY_PATTERN["row"], *randn(dtype, n=N, dim=dim, batch=BATCH[dtype]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [33, 128])
@pytest.mark.parametrize("name", NAMES)
def test_head_dims_of_every_pattern(name, dim, dtype, seed):
    check(EVERY_PATTERN[name], *randn(dtype, n=N, dim=dim, batch=BATCH[dtype]), split=1)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 16])
def test_tiny_head_dims(dim, seed):
    """In float32, of so few elements, plain PyTorch's sums are nearly exact: a tolerance."""
    q, k, v = randn(torch.float32, n=N, dim=dim)
    grad = torch.randn_like(q)
    exact = run(
        lambda *x: plain_attention(*x, EVERY_PATTERN["row"].dense(), dim**-0.5), [x.double() for x in (q, k, v)], grad
    )[2:]
    for a, e in zip(gradients(q, k, v, grad, EVERY_PATTERN["row"]), exact):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bnhd", "qkv", "offset"])
def test_layouts(layout, dtype, seed):
    """Heads beside each other, fused projections, and views that no 16-byte access fits, with NaN all around; the
    gradient of the output has a layout of its own.
    """
    grad = make("bnhd" if layout == "offset" else "offset", 4, 4, N, 48, dtype)[0]
    check(EVERY_PATTERN["column"], *make(layout, 4, 4, N, 48, dtype), grad=grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_expanded_gradient(dtype, seed):
    """As the backward of a sum gives it, with strides of 0."""
    grad = torch.randn(32).to(dtype).expand(4, 4, N, 32)
    check(EVERY_PATTERN["row"], *randn(dtype, n=N, dim=32), grad=grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 15, 64, 65, 90])
def test_shorter_sequences(n, dtype, seed):
    storage = torch.full((4, 8, 4, N, 32), float("nan"), dtype=dtype)  # nobody looks beyond n
    storage[..., :n, :] = torch.randn(4, 8, 4, n, 32)
    q, k, v, grad = storage[..., :n, :]
    check(EVERY_PATTERN["column"], q, k, v, grad=grad)
    if n == 1:
        grad_v = gradients(q, k, v, grad, EVERY_PATTERN["column"])[2]
        torch.testing.assert_close(grad_v, grad.contiguous(), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("split", "dim"), [(1, 64), (2, 40)])
def test_split_tiles(split, dim, dtype, seed):
    """Some parts of a tile hold nothing that some of its rows see."""
    name = "mask" if split == 1 else "causal"
    pattern = every_pattern(41, (10, 11))[name]
    check(pattern, *randn(dtype, n=151, dim=dim), split=split)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [5.0, 40.0])
def test_large_logits(factor, dtype, seed):
    """lse is large then, and so is its rounding error."""
    q, k, v = torch.randn(3, 2 * BATCH[dtype], 4, N, 32)
    check(EVERY_PATTERN["row"], (q * factor).to(dtype), k.to(dtype), v.to(dtype), split=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.2, 0.15])
def test_any_scale(scale, dtype, seed):
    check(EVERY_PATTERN["row"], *randn(dtype, n=90, dim=32, batch=BATCH[dtype]), scale)


@pytest.mark.parametrize("split", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_pairs_change_no_bit(dtype, split, seed):
    """Whatever finite values lie at a key, the gradients of queries that do not see it stay as they are; and whatever
    lies at a query, those of keys that it does not see.
    """
    pattern = EVERY_PATTERN["mask"]
    tensors = torch.stack([*randn(dtype, batch=1, heads=2, n=N, dim=48), torch.randn(1, 2, N, 48).to(dtype)])
    token = int(torch.randint(1, N - 1, ()))
    before = gradients(*tensors, pattern, split=split)
    big = 6e4 if dtype == torch.float16 else 1e30
    for changed, results, blind in (
        ((1, 2), (0,), ~pattern.dense()[:, token]),
        ((0, 3), (1, 2), ~pattern.dense()[token]),
    ):
        other = tensors.clone()
        other[changed[0], :, :, token], other[changed[1], :, :, token] = big, -big
        after = gradients(*other, pattern, split=split)
        for i in results:
            assert torch.equal(after[i][:, :, blind], before[i][:, :, blind])


@pytest.mark.parametrize("split", [None, 1])
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "grad"])
def test_nan_shows_where_it_is_seen(which, split, seed):
    """A query whose gradient depends on a NaN has a NaN there; other heads have none."""
    pattern = EVERY_PATTERN["row"]
    for dtype in DTYPES:
        tensors = torch.randn(4, 1, 2, N, 32).to(dtype)
        tensors[which, 0, 0, 10] = torch.nan
        seen = torch.arange(N) == 10 if which in (0, 3) else pattern.dense()[:, 10]
        results = gradients(*tensors, pattern, split=split)
        assert results[0].isnan().any(-1)[0, 0, seen].all()
        assert not any(result[0, 1].isnan().any() for result in results)


@pytest.mark.parametrize("split", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_schedule_nor_batch(dtype, split, seed):
    pattern = EVERY_PATTERN["corner_conv"]
    q, k, v = randn(dtype, batch=3, heads=2, n=N, dim=64)
    grad = torch.randn_like(q)
    expected = gradients(q, k, v, grad, pattern, split=split)
    for emulation_seed in (1, 2, 3):
        one = [x[1:2, 1:] for x in (q, k, v, grad)]
        for a, b in zip(gradients(*one, pattern, split=split, seed=emulation_seed), expected):
            assert torch.equal(a, b[1:2, 1:])


@pytest.mark.parametrize(("dim", "padded"), [(32, 32), (64, 64), (72, 128)])
def test_only_live_parts_are_computed_without_bank_conflicts(dim, padded, seed):
    pattern = EVERY_PATTERN["conv-clip"]
    live = []
    for plan in plans(pattern, N)[:2]:
        entries, at = plan[6].item(), plan[15].item()
        words = plan[at : at + 4 * entries].view(-1, 4)[:, 3].tolist()
        live.append(sum((word & 0xFFFFFFFF).bit_count() for word in words))
    q, k, v = randn(torch.bfloat16, batch=1, heads=1, n=N, dim=dim)
    gradients(q, k, v, torch.randn_like(q), pattern)
    counts = emulated.counts()
    deltas = 4 * emulated.plans(pattern, N)[2][3]  # one product for each of the 4 warps of an item
    assert counts["mma"] == (3 * live[0] + 4 * live[1] + deltas) * padded // 8
    assert counts["ldmatrix"] == counts["ldmatrix_passes"] > 0


def test_empty_batch():
    q, k, v = randn(torch.bfloat16, batch=0, n=N)
    assert all(x.shape == q.shape for x in gradients(q, k, v, q, EVERY_PATTERN["row"]))


@pytest.mark.parametrize("name", ["row", "column", "conv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_the_papers_size(name, dtype, seed):
    pattern = getattr(dk.AttentionPattern, name)(256, (32, 32))
    check(pattern, *randn(dtype, batch=1, heads=1, n=1280))
