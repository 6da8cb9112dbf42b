"""Cached plans and decode schedules on devices: each is compiled and uploaded once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..compile import plain_tensors
from ..decode_schedule import DecodeSchedule, compile_schedule
from ..patterns import AttentionPattern
from ..plan import PlanHeader, Side, TileShape, compile_plan


class PlanSizes(NamedTuple):
    """The words of a plan's header that the host needs to launch kernels. Operations take both plans' as one list."""

    length: int
    rows: int
    columns: int
    items: int
    partials: int
    split_tiles: int


class Tiles(NamedTuple):
    """The tile shapes of a backend's plans: tiles of queries and, for the backward pass, tiles of keys."""

    query: TileShape
    key: TileShape | None = None
    """None: the backward pass reads the query plan."""


@functools.lru_cache(maxsize=256)
def plan_tensor(
    pattern: AttentionPattern, n: int, device: torch.device, shape: TileShape, side: Side = "query", first: int = 0
) -> tuple[torch.Tensor, PlanSizes]:
    """The packed plan of the pattern's first n tokens (int32 on `device`) and its sizes. Queries are the tokens from
    `first` on.

    Raises:
        ValueError: n is not in [1, pattern.seq_len], or the plan is too large for int32.
    """
    if not 1 <= n <= pattern.seq_len:
        raise ValueError(f"n must lie in [1, {pattern.seq_len}], the pattern's length; got {n}")
    with plain_tensors():
        packed = compile_plan(pattern, n, shape, side, first).packed
        sizes = PlanSizes(*(int(packed[PlanHeader[name.upper()]]) for name in PlanSizes._fields))
        return torch.from_numpy(packed).to(device), sizes


@functools.lru_cache(maxsize=256)
def plan_tensors(
    pattern: AttentionPattern, n: int, device: torch.device, tiles: Tiles, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """The plan and the backward plan of the queries from `first` on, on `device`; their PlanSizes, concatenated."""
    plan, sizes = plan_tensor(pattern, n, device, tiles.query, "query", first)
    if tiles.key is None:
        return plan, plan, sizes + sizes
    backward_plan, backward_sizes = plan_tensor(pattern, n, device, tiles.key, "key", first)
    return plan, backward_plan, sizes + backward_sizes


@functools.lru_cache(maxsize=256)
def schedule_tensor(
    pattern: AttentionPattern,
    device: torch.device,
    compiler: Callable[[AttentionPattern], DecodeSchedule] = compile_schedule,
) -> torch.Tensor:
    """The packed decode schedule of the pattern, or with `compile_text_schedule` of its text, int32 on `device`."""
    with plain_tensors():
        return torch.from_numpy(compiler(pattern).packed).to(device)
