"""What the ranks of tests/test_sharding.py run: two processes that communicate by gloo."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import dalle_kernels as dk
from dalle.generation.sampler import generate_codes
from dalle.models.prior import Prior, PriorConfig

PATTERN = dk.AttentionPattern.row(3, (3, 4))


def run(check, rank, ranks, store):
    """Runs a check of this module as one of several ranks that meet in the file `store`."""
    torch.set_num_threads(1)
    meeting = dist.FileStore(store, ranks)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        torch.manual_seed(0)
        return globals()[check](init_device_mesh("cpu", (ranks,)))
    finally:
        dist.destroy_process_group()


def attention(mesh):
    """Results and gradients on DTensors have the bits of those on plain tensors."""
    q, k, v, grad = torch.randn(4, 3, 2, PATTERN.seq_len, 8)  # three sequences on two ranks
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = dk.sparse_attention(*plain, PATTERN, scale=0.3, return_lse=True)
    gradients = torch.autograd.grad(expected[0], plain, grad)
    for placement in (Shard(0), Shard(1), Replicate()):
        sharded = [distribute_tensor(x, mesh, [placement]).requires_grad_() for x in (q, k, v)]
        out, lse = dk.sparse_attention(*sharded, PATTERN, scale=0.3, return_lse=True)
        assert out.placements == lse.placements == (placement,) and out.stride() == q.stride()
        assert torch.equal(out.full_tensor(), expected[0]) and torch.equal(lse.full_tensor(), expected[1])
        found = torch.autograd.grad(out, sharded, distribute_tensor(grad, mesh, [placement]))
        for a, b in zip(found, gradients, strict=True):
            assert a.placements == (placement,) and torch.equal(a.full_tensor(), b)
    assert isinstance(dk.sparse_attention(*sharded, PATTERN), DTensor)


def options(mesh):
    """Text lengths, dropout and grouped queries are those of the whole, however it is split."""
    q, (k, v) = torch.randn(3, 4, PATTERN.seq_len, 8), torch.randn(2, 3, 2, PATTERN.seq_len, 8)
    lengths = torch.tensor([3, 0, 2])
    for seed in (7, torch.tensor([1, 2, 3])):
        shared = dict(text_lengths=lengths, dropout_p=0.4, seed=seed, head_offset=5)
        expected = dk.sparse_attention(q, k, v, PATTERN, **shared)
        for placement in (Shard(0), Shard(1), Replicate()):
            sharded = [distribute_tensor(x, mesh, [placement]) for x in (q, k, v)]
            assert torch.equal(dk.sparse_attention(*sharded, PATTERN, **shared).full_tensor(), expected)


def refused(mesh):
    """The messages for what cannot be sharded."""
    x = torch.randn(2, 2, PATTERN.seq_len, 8)
    batch, heads, tokens = (distribute_tensor(x, mesh, [Shard(dim)]) for dim in range(3))
    partial = DTensor.from_local(x, mesh, [Partial()])
    q, k = (distribute_tensor(torch.randn(2, count, PATTERN.seq_len, 8), mesh, [Shard(1)]) for count in (6, 3))
    messages = []
    for arguments, p in (
        ((batch, x, batch), 0),
        ((batch, heads, batch), 0),
        ((tokens,) * 3, 0),
        ((partial,) * 3, 0),
        ((q, k, k), 0),
        ((batch,) * 3, 0.1),
    ):
        try:
            dk.sparse_attention(*arguments, PATTERN, dropout_p=p)
        except (TypeError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    cache = dk.DecodeCache([PATTERN], prompts=2, candidates=1, heads=2, head_dim=8, dtype=torch.float32)
    try:
        cache.prefill(0, batch[:, :, :3], batch[:, :, :3])
    except TypeError as error:
        messages.append(str(error))
    return messages


def generation(mesh):
    """A prior under FSDP2 generates what a plain one does, before and after it trains, with another count per rank."""
    config = PriorConfig(4, 20, (2, 3), 10, layers=2, heads=2, head_dim=8, conv_kernel=3)
    plain, sharded = Prior(config), Prior(config)
    sharded.load_state_dict(plain.state_dict())
    for module in (*sharded.layers, sharded):
        fully_shard(module, mesh=mesh)
    codes = torch.randint(10, (2, 6))
    for _ in range(2):
        rank = dist.get_rank()
        text, seeds = plain.pack_text([[1, 2], [3]])[: rank + 1], torch.arange(2 * (rank + 1))
        expected, found = (generate_codes(x.eval(), text, candidates=2, seeds=seeds) for x in (plain, sharded))
        assert torch.equal(expected, found)
        for prior in (plain, sharded):
            optimizer = torch.optim.SGD(prior.parameters(), lr=1.0)
            prior.train().loss(plain.pack_text([[1, 2], [3]]), codes)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
