"""The tiling of the Triton kernels, with tiles of the launch table and others, and their registered operations.
test_conformance.py has the requirements on every backend.
"""

import pytest
import torch
from triton_for_tests import DEVICE, DTYPES, ON_GPU, TARGET, on_device  # noqa: F401

import dalle_kernels as dk
from conformance import decode_attention, gumbel_softmax, sample_tokens, sparse_attention
from dalle_kernels.backends.options import NO_OPTIONS
from dalle_kernels.backends.plans import plan_tensors
from dalle_kernels.backends.triton import decode_attention as decode_kernels
from dalle_kernels.backends.triton import gumbel_softmax as gumbel_kernels
from dalle_kernels.backends.triton import launch
from dalle_kernels.decode_schedule import compile_schedule
from patterns_for_tests import every_pattern

P = dk.AttentionPattern
OPS = torch.ops.dalle_kernels_triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from NumPy: padding rows compute 0 / 0

dtypes = pytest.mark.parametrize("dtype", DTYPES)
hards = pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])


# -- sparse_attention


def plans(pattern, n, head_dim, dtype):
    """The plan, the backward plan, and the sizes of both."""
    return plan_tensors(pattern, n, DEVICE, launch.tiles(DEVICE, head_dim, dtype))


@dtypes
@pytest.mark.parametrize("dim", [40, 128, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (32, 64, 127))])
def test_tiles_of_the_table(dim, dtype, on_device, seed):  # noqa: F811
    launch.OVERRIDES.clear()
    sparse_attention.accuracy(TARGET, "row", dtype, dim=dim)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["row", "conv"])
def test_the_papers_size_with_the_tiles_of_the_table(name, on_device, seed):  # noqa: F811
    """At this size tiles are split by default."""
    launch.OVERRIDES.clear()
    *_, sizes = plans(getattr(P, name)(256, (32, 32)), 1280, 64, torch.float16)
    assert sizes[11], "the keys' plan has split tiles"
    sparse_attention.papers_size(TARGET, name, "float16")


def test_split_tiles():
    with TARGET.split_after(1):
        *_, sizes = plans(every_pattern(21, (8, 10))["mask"], 101, 40, torch.float32)
    assert sizes[5] and sizes[11], "both plans have split tiles"


def test_other_tiles_give_the_same(monkeypatch, seed):
    pattern = every_pattern(21, (8, 10))["conv-wrap"]
    *tensors, grad = torch.randn(4, 1, 4, 101, 32)
    expected = sparse_attention.attend(TARGET, pattern, tensors, grad)
    for rows, columns in ((32, 16), (128, 32)):
        for kernel in ("sparse_attention", "sparse_attention.grad_q", "sparse_attention.grad_kv"):
            monkeypatch.setitem(launch.OVERRIDES, kernel, launch.Launch(rows, columns, 4, 1))
        for a, b in zip(sparse_attention.attend(TARGET, pattern, tensors, grad), expected):
            torch.testing.assert_close(a, b)


# -- gumbel_softmax


@pytest.fixture
def tiles(monkeypatch):
    """tiles(rows, columns) sets the maximum tile size."""
    return lambda rows, columns: [
        monkeypatch.setitem(launch.OVERRIDES, name, launch.Launch(rows, columns, 4, 1))
        for name in ("gumbel_softmax", "gumbel_softmax.last")
    ]


@dtypes
@hards
@pytest.mark.parametrize("shape", [(50, 150), (2, 150, 33)], ids=str)
def test_positions_of_several_chunks(shape, hard, dtype, tiles, monkeypatch, seed):
    """Positions with several chunks, including merges in several steps."""
    tiles(32, 32)
    monkeypatch.setattr(gumbel_kernels, "CHUNKS", 2)
    gumbel_softmax.accuracy(TARGET, dtype, hard, shape, 1, taus=(0.7,))


@hards
@pytest.mark.parametrize("shape", [(8, 70), (1, 70, 8)], ids=str)
def test_broken_rows_of_several_chunks(shape, hard, tiles, seed):
    tiles(16, 16)
    gumbel_softmax.broken_rows(TARGET, shape, hard)


@pytest.mark.parametrize("tile", [(32, 32), (128, 256)])
@pytest.mark.parametrize("check", [gumbel_softmax.first_of_equals, gumbel_softmax.soft_and_hard])
def test_checks_with_tiles_of(tile, check, tiles, seed):
    tiles(*tile)
    check(TARGET)


@pytest.mark.parametrize("tile", [(32, 32), (128, 32)])
@pytest.mark.parametrize(("shape", "dim"), [((40, 50), 1), ((2, 100, 33), 1), ((70, 2, 3), 0)], ids=str)
def test_noise(shape, dim, tile, tiles, seed):
    tiles(*tile)
    gumbel_softmax.noise(TARGET, shape, dim)


@dtypes
def test_bits_with_small_tiles(dtype, tiles, seed):
    tiles(64, 64)
    gumbel_softmax.bits(TARGET, dtype)


# -- sample_tokens


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 tokens."""
    monkeypatch.setitem(launch.OVERRIDES, "sample_tokens", launch.Launch(1, 64, 4, 1))


@dtypes
def test_rows_longer_than_a_block(dtype, small_blocks, seed):
    sample_tokens.definition(TARGET, dtype, 2, 150)
    sample_tokens.broken_rows(TARGET, dtype)


# -- decode_attention


def test_more_runs_of_keys_than_are_taken_together(seed):
    """100 text keys are more than one iteration processes, and the mask has more runs than one iteration reads."""
    pattern = every_pattern(100, (3, 3))["mask"]
    assert compile_schedule(pattern).steps[:, 4].max() > decode_kernels.RUNS.value
    for dtype in DTYPES:
        decode_attention.accuracy(TARGET, pattern, dtype, prompts=2, candidates=2, heads=1)


def step_arguments(pattern, step, heads=2, dim=40):
    """The arguments of the operation at a step, with zeros for earlier keys and values."""
    q, k, v = decode_attention.make(TARGET, pattern, 2, 3, heads, dim, torch.float32)
    cache = decode_attention.new_cache(pattern, k, v, 2)
    layer = cache.layer(0)
    token = [x[:, :, pattern.text_len] for x in (q, k, v)]
    storage = layer.prefix_k, layer.prefix_v, layer.image_k.zero_(), layer.image_v.zero_()
    return *token, *storage, layer.schedule, cache.step.fill_(step), 0.2


@pytest.mark.parametrize("step", [-1, 12, 2**40])
def test_a_step_outside_the_image(step, seed):
    """A device cannot raise: the result is NaN, and the cache is unchanged."""
    arguments = step_arguments(P.row(5, (3, 4)), step, heads=1)
    assert OPS.decode_attention(*arguments).isnan().all() and not arguments[5].any() and not arguments[6].any()


def test_nothing_is_read_on_the_host(monkeypatch):
    """A step works on fake tensors, so that it can be captured as a graph."""
    started = []
    monkeypatch.setattr(launch, "start", lambda kernel, *arguments, **constants: started.append(kernel))
    *tensors, scale = step_arguments(P.row(5, (3, 4)), 0)
    out = decode_kernels._decode_attention(*(x.to("meta") for x in tensors), scale)
    assert out.shape == tensors[0].shape and len(started) == 2


def test_capturable(monkeypatch):
    cache = dk.DecodeCache([P.row(3, (2, 2))], prompts=1, candidates=1, heads=1, head_dim=8, dtype=torch.float32)
    with dk.use_backend("triton"):
        assert cache.capturable == ON_GPU
        monkeypatch.setattr(dk.DecodeCache, "device", torch.device("cuda"))
        assert cache.capturable
    with dk.use_backend("reference"):
        assert not cache.capturable


# -- the registered operations


@pytest.mark.parametrize("layout", ["bhnd", "qkv"])
def test_opcheck_of_sparse_attention(layout, seed):
    q, k, v = (x.requires_grad_() for x in sparse_attention.make(TARGET, layout, 1, 2, 17, 32, torch.float32))
    arguments = q, k, v, *plans(P.column(5, (3, 4)), 17, 32, torch.float32), 0.2, *NO_OPTIONS
    torch.library.opcheck(OPS.sparse_attention.default, arguments)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("return_kl", [False, True])
@hards
def test_opcheck_of_gumbel_softmax(hard, return_kl, layout, seed):
    x = gumbel_softmax.make(TARGET, layout, (3, 10, 4), torch.float32).requires_grad_()
    arguments = x, torch.tensor(seed), torch.tensor(0.5), hard, 1, return_kl
    torch.library.opcheck(OPS.gumbel_softmax.default, arguments)


def test_opcheck_of_inference(seed):
    arguments = torch.randn(3, 50), torch.arange(3), torch.arange(3), 0.9, 10, 0.8
    torch.library.opcheck(OPS.sample_tokens.default, arguments)
    arguments = step_arguments(P.conv(5, (3, 4), kernel=3), 2)
    torch.library.opcheck(OPS.decode_attention.default, arguments)
