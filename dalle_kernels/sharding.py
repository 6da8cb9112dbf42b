"""Attention on DTensors: every rank computes the sequences and heads that it holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .patterns import AttentionPattern
from .philox import seeds_of


def is_sharded(*tensors: Any) -> bool:
    """Whether one of them is a DTensor. Does not import torch.distributed.tensor, which takes a second."""
    return any(type(x) is not torch.Tensor and hasattr(x, "device_mesh") for x in tensors)


def attend_locally(
    attend: Callable,
    q: Any,
    k: Any,
    v: Any,
    pattern: AttentionPattern,
    text_lengths: torch.Tensor | None,
    dropout_p: float,
    seed: int | torch.Tensor | None,
    head_offset: int,
    **shared: Any,
) -> Any:
    """`sparse_attention` (as `attend`) on the local tensors of DTensors q, k and v. The results are placed as q.
    text_lengths and seed are those of the whole batch, equal on every rank.

    Raises:
        TypeError: not all of q, k and v are DTensors.
        ValueError: they differ in mesh or placements, they are sharded over anything but the batch or heads, shards
            would divide the queries of one head of k, or there is dropout without a seed.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard  # imported already by whoever made a DTensor

    if not (isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor)):
        kinds = [type(x).__name__ for x in (q, k, v)]
        raise TypeError(f"q, k and v must all be DTensors if one is; got {kinds[0]}, {kinds[1]} and {kinds[2]}")
    mesh, placements = q.device_mesh, q.placements
    _check_placements(q, k, v)

    def part(x, dim):
        """The rank's part of a plain tensor, whose only dimension is dimension `dim` of q."""
        mine = [Shard(0) if placement.is_shard(dim) else Replicate() for placement in placements]
        return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim).redistribute(placements=mine).to_local()

    options = {} if text_lengths is None else {"text_lengths": part(text_lengths, 0)}
    if dropout_p:
        if seed is None:
            raise ValueError("dropout on DTensors needs a seed, since every rank would take another one")
        heads = part(torch.arange(q.shape[1], device=q.device), 1).tolist()
        seeds = part(seeds_of(seed, q.shape[0], q.device), 0)
        options |= dict(dropout_p=dropout_p, seed=seeds, head_offset=head_offset + (heads or [0])[0])

    def placed(x):
        stride = q.stride() if x.ndim == 4 else torch.empty(q.shape[: x.ndim], device="meta").stride()
        return DTensor.from_local(x, mesh, placements, shape=q.shape[: x.ndim], stride=stride)

    results = attend(q.to_local(), k.to_local(), v.to_local(), pattern, **options, **shared)
    return tuple(map(placed, results)) if isinstance(results, tuple) else placed(results)


def _check_placements(q, k, v):
    mesh, placements = q.device_mesh, q.placements
    for x in (k, v):
        if x.device_mesh != mesh or x.placements != placements:
            raise ValueError(
                f"q, k and v must share one mesh and placements; got {placements} on {mesh} and {x.placements} on "
                f"{x.device_mesh}"
            )
    if not all(p.is_replicate() or p.is_shard(0) or p.is_shard(1) for p in placements):
        raise ValueError(
            f"q, k and v may be sharded over the batch, Shard(0), or heads, Shard(1); got {placements}: redistribute "
            "them first"
        )
    shards = math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_shard(1))
    if q.ndim == k.ndim == 4 and q.shape[1] != k.shape[1] and k.shape[1] % shards:
        raise ValueError(
            f"the heads of k and v, which those of q share in groups, must be divisible by their {shards} shards; got "
            f"{k.shape[1]}"
        )
