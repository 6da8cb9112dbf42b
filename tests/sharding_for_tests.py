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
    out = dk.sparse_attention(*sharded, PATTERN)
    assert isinstance(out, DTensor)


def refused(mesh):
    """The messages for what cannot be sharded."""
    x = torch.randn(2, 2, PATTERN.seq_len, 8)
    batch, heads, tokens = (distribute_tensor(x, mesh, [Shard(dim)]) for dim in range(3))
    partial = DTensor.from_local(x, mesh, [Partial()])
    messages = []
    for arguments in ((batch, x, batch), (batch, heads, batch), (tokens,) * 3, (partial,) * 3):
        try:
            dk.sparse_attention(*arguments, PATTERN)
        except (TypeError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
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
