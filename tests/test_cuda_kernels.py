"""The CUDA kernels under emulation: instructions, launches, device generations, and arguments that the public functions
never pass. test_conformance.py has the requirements on every backend.
"""

import functools

import pytest
import torch
from cuda_emulation import emulated
from cuda_emulation.backend import EMULATED

import dalle_kernels as dk
from conformance import Target, decode_attention, gumbel_softmax
from conformance.target import same
from dalle_kernels.backends import BACKENDS
from dalle_kernels.backends.options import NO_OPTIONS
from patterns_for_tests import every_pattern

P = dk.AttentionPattern
TARGET = Target("emulated", simulated=True)
EVERY_PATTERN = every_pattern(21, (8, 10))  # two tiles of 64, the second with a partial block of 16 rows
N = 101


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setitem(BACKENDS, "emulated", EMULATED)
    with dk.use_backend("emulated"):
        yield


def live_parts(plan):
    entries, at = plan[6].item(), plan[15].item()
    return sum((word & 0xFFFFFFFF).bit_count() for word in plan[at : at + 4 * entries].view(-1, 4)[:, 3].tolist())


@pytest.mark.parametrize("name", ["row", "conv-clip", "mask"])
@pytest.mark.parametrize(("dim", "padded"), [(32, 32), (64, 64), (72, 128)])
def test_only_live_parts_are_computed_without_bank_conflicts(dim, padded, name, seed):
    pattern = EVERY_PATTERN[name]
    plan, backward_plan, sizes = emulated.plans(pattern, N)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, N, dim, dtype=torch.bfloat16))
    out = dk.sparse_attention(q, k, v, pattern)
    counts = emulated.counts()
    assert counts["mma"] == live_parts(plan) * (2 * padded // 16 + padded // 8)
    assert counts["ldmatrix"] == counts["ldmatrix_passes"] > 0
    out.backward(torch.randn_like(out))
    counts = emulated.counts()
    deltas = 4 * sizes[3]  # one product per warp, 4 per item
    assert counts["mma"] == (3 * live_parts(plan) + 4 * live_parts(backward_plan) + deltas) * padded // 8
    assert counts["ldmatrix"] == counts["ldmatrix_passes"] > 0


def test_plans_and_sizes_must_belong_together():
    x = torch.randn(1, 2, N, 64).bfloat16()
    plan, backward_plan, sizes = emulated.plans(EVERY_PATTERN["row"], N)
    for wrong, message in ((sizes[:6], "six sizes of each of two plans"), ((sizes[0] + 1, *sizes[1:]), "words")):
        with pytest.raises(RuntimeError, match=message):
            emulated.run("sparse_attention", x, x, x, plan, backward_plan, wrong, 1.0, *NO_OPTIONS)


# Several chunks of classes: a cluster from capability 90 on, before that one block that reads twice.
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("shape", [(2, 4100, 16), (3, 20, 5), (1, 20000), (2, 5000, 7)], ids=str)
def test_gumbel_softmax_has_the_same_bits_on_every_device(shape, hard, monkeypatch, seed):
    for dtype in (torch.float32, torch.bfloat16):
        x, key, grads = torch.randn(shape).to(dtype), TARGET.seeds(), (torch.randn(shape), torch.randn(shape).sum(1))
        results, relax = [], functools.partial(gumbel_softmax.relax, TARGET, seed=key, hard=hard)
        for capability in (80, 90):
            monkeypatch.setattr(EMULATED, "capability", capability)
            results.append(gumbel_softmax.run(relax, x, *grads))
        same(*results)


def test_one_launch(seed):
    dk.sample_tokens(torch.randn(3, 40), top_k=7, top_p=0.5)
    assert emulated.counts()["launches"] == 1
    pattern = P.row(5, (2, 4))
    tensors = decode_attention.make(TARGET, pattern, 2, 3, 2, 24, torch.bfloat16)
    decode_attention.decode(TARGET, pattern, *tensors, 2, steps=1)
    assert emulated.counts()["launches"] == 1


@pytest.mark.parametrize("step", [6, 2**40, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_outside_the_image_touches_nothing(dtype, step, seed):
    pattern = P.row(2, (2, 3))
    q, k, v = decode_attention.make(TARGET, pattern, 1, 2, 1, 8, dtype)
    cache = decode_attention.new_cache(pattern, k, v, 1)
    layer, step = cache.layer(0), torch.tensor(step)
    storage = layer.prefix_k, layer.prefix_v, layer.image_k.fill_(7.0), layer.image_v.fill_(7.0)
    new = (x[:, :, 2].contiguous() for x in (q, k, v))
    assert emulated.run("decode_attention", *new, *storage, layer.schedule, step, 0.3).isnan().all()
    assert (layer.image_k == 7.0).all() and (layer.image_v == 7.0).all()
