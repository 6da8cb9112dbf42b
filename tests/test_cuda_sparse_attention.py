"""The CUDA kernel of sparse_attention, forward, under emulation, against plain PyTorch in float64."""

import pytest
import torch
from cuda_emulation import emulated
from test_sparse_attention import make, plain_attention

import dalle_kernels as dk
from accuracy import assert_accurate
from dalle_kernels.backends.plans import plan_tensor
from dalle_kernels.plan import TileShape
from patterns_for_tests import NAMES, every_pattern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
TEXT, GRID = 41, (9, 13)  # 158 tokens: three tiles, the last with a part of 16 rows that is not full and two empty ones
EVERY_PATTERN = every_pattern(TEXT, GRID)


def attention(q, k, v, pattern, scale=None, split=None, seed=None):
    """(out, lse) of the emulated kernel; `split`: after how many entries tiles are split between work items."""
    n = q.shape[2]
    plans = emulated.plans(pattern, n)
    if split is not None:
        plan, sizes = plan_tensor(pattern, n, torch.device("cpu"), TileShape(64, 64, longest_run=1, split=split))
        plans = plan, plan, sizes + sizes
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return emulated.run("sparse_attention", q, k, v, *plans, scale, seed=seed)


def check(pattern, q, k, v, scale=None, split=None):
    n = q.shape[2]
    mask = pattern.dense()[:n, :n]
    used = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attention(q, k, v, pattern, scale, split)
    exact = plain_attention(*(x.double() for x in (q, k, v)), mask, used)
    plain = plain_attention(q, k, v, mask, used)
    assert_accurate(out, exact[0], plain[0], f"cuda sparse_attention out {q.dtype}")
    assert_accurate(lse, exact[1], plain[1].float(), f"cuda sparse_attention lse {q.dtype}")


def randn(dtype, *, batch=4, heads=4, n=TEXT + GRID[0] * GRID[1], dim=64):
    """q, k and v. With 16 heads the largest error is a property of the kernel, and not the chance of few rows."""
    return torch.randn(3, batch, heads, n, dim).to(dtype).unbind(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matches_float64(name, dtype, seed):
    check(EVERY_PATTERN[name], *randn(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 40, 127, 128])
def test_head_dims(dim, dtype, seed):
    check(EVERY_PATTERN["conv-clip"], *randn(dtype, dim=dim))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 33, 128])
@pytest.mark.parametrize("name", NAMES)
def test_head_dims_of_every_pattern(name, dim, dtype, seed):
    for split in (None, 1):
        check(EVERY_PATTERN[name], *randn(dtype, dim=dim), split=split)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "qkv", "offset"])
def test_layouts(layout, dtype, seed):
    """Heads beside each other, fused projections, and views that no 16-byte access fits, with NaN all around."""
    pattern = EVERY_PATTERN["row"]
    check(pattern, *make(layout, 4, 4, 158, 48, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 15, 64, 65, 130])
def test_shorter_sequences(n, dtype, seed):
    storage = torch.full((3, 4, 4, 158, 32), float("nan"), dtype=dtype)  # nobody looks beyond n
    storage[..., :n, :] = torch.randn(3, 4, 4, n, 32)
    q, k, v = storage[..., :n, :]
    check(EVERY_PATTERN["column"], q, k, v)
    if n == 1:
        assert torch.equal(attention(q, k, v, EVERY_PATTERN["column"])[0], v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("split", "dim"), [(1, 64), (2, 40)])
def test_split_tiles(split, dim, dtype, seed):
    """Some parts of a tile hold no key that some of its rows see."""
    for name in ("mask", "causal"):
        _, sizes = plan_tensor(EVERY_PATTERN[name], 158, torch.device("cpu"), TileShape(64, 64, 1, split))
        assert sizes.split_tiles > 0
        check(EVERY_PATTERN[name], *randn(dtype, dim=dim), split=split)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [5.0, 40.0])
def test_large_logits(factor, dtype, seed):
    q, k, v = torch.randn(3, 8, 2, 158, 64)
    for split in (None, 1):
        check(EVERY_PATTERN["row"], (q * factor).to(dtype), k.to(dtype), v.to(dtype), split=split)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.2, 0.37])
def test_any_scale(scale, dtype, seed):
    q, k, v = randn(dtype, n=90, dim=32)
    for split in (None, 1):
        check(EVERY_PATTERN["row"], q, k, v, scale, split)


@pytest.mark.parametrize("split", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["conv-clip", "mask"])
def test_hidden_keys_change_no_bit(name, dtype, split, seed):
    pattern = EVERY_PATTERN[name]
    q, k, v = randn(dtype, batch=1, heads=2)
    hidden = int(torch.randint(1, 157, ()))
    blind = ~pattern.dense()[:, hidden]
    before = attention(q, k, v, pattern, split=split)
    big = 6e4 if dtype == torch.float16 else 1e30
    k[:, :, hidden], v[:, :, hidden] = big, -big
    after = attention(q, k, v, pattern, split=split)
    for a, b in zip(before, after):
        assert torch.equal(a[:, :, blind], b[:, :, blind])
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("split", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
def test_nan_shows_where_it_is_seen(which, dtype, split, seed):
    pattern = EVERY_PATTERN["row"]
    tensors = torch.stack(randn(dtype, batch=1, heads=2))
    tensors[which, 0, 0, 50] = torch.nan
    seen = torch.arange(158) == 50 if which == 0 else pattern.dense()[:, 50]
    results = attention(*tensors, pattern, split=split)
    for result in results[: 2 if which < 2 else 1]:  # the values have no part in lse
        broken = result.isnan().view(1, 2, 158, -1).any(-1)
        assert broken[0, 0, seen].all() and not broken[0, 1].any()
        assert which == 2 or not broken[0, 0, ~seen].any()


@pytest.mark.parametrize("split", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_schedule_nor_batch(dtype, split, seed):
    pattern = EVERY_PATTERN["corner_conv"]
    q, k, v = randn(dtype, batch=3, heads=2)
    expected = attention(q, k, v, pattern, split=split)
    for emulation_seed in (1, 2, 3):
        one = [x[1:2, 1:] for x in (q, k, v)]
        for a, b in zip(attention(*one, pattern, split=split, seed=emulation_seed), expected):
            assert torch.equal(a, b[1:2, 1:])


@pytest.mark.parametrize("name", ["row", "conv-clip", "mask"])
@pytest.mark.parametrize(("dim", "padded"), [(32, 32), (64, 64), (72, 128)])
def test_only_live_parts_are_computed_without_bank_conflicts(dim, padded, name, seed):
    plan = emulated.plans(EVERY_PATTERN[name], 158)[0]
    entries, at = plan[6].item(), plan[15].item()
    live = sum((word & 0xFFFFFFFF).bit_count() for word in plan[at : at + 4 * entries].view(-1, 4)[:, 3].tolist())
    attention(*randn(torch.bfloat16, batch=1, heads=1, dim=dim), EVERY_PATTERN[name])
    counts = emulated.counts()
    assert counts["mma"] == live * (2 * padded // 16 + padded // 8)
    assert counts["ldmatrix"] == counts["ldmatrix_passes"] > 0


def test_empty_batch():
    q, k, v = randn(torch.bfloat16, batch=0)
    out, lse = attention(q, k, v, EVERY_PATTERN["row"])
    assert out.shape == q.shape and lse.shape == q.shape[:3]


def test_plans_and_sizes_must_belong_together():
    q, k, v = randn(torch.bfloat16, batch=1)
    plan, backward_plan, sizes = emulated.plans(EVERY_PATTERN["row"], 158)
    for wrong, message in ((sizes[:6], "six sizes of each of two plans"), ((sizes[0] + 1, *sizes[1:]), "words")):
        with pytest.raises(RuntimeError, match=message):
            emulated.run("sparse_attention", q, k, v, plan, backward_plan, wrong, 1.0)


@pytest.mark.parametrize("name", ["row", "column", "conv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_the_papers_size(name, dtype, seed):
    pattern = getattr(dk.AttentionPattern, name)(256, (32, 32))
    check(pattern, *randn(dtype, batch=1, heads=1, n=1280))
