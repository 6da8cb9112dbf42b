"""The base class of backends. A backend implements every operation, in a package with one module per operation."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from ..patterns import AttentionPattern
from .plans import Tiles, plan_tensors

OPERATIONS = ("sparse_attention", "gumbel_softmax", "sample_tokens", "decode_attention")


class Backend:
    """One implementation of every operation.

    The package of a subclass has one module per name in OPERATIONS, with a function of that name. The function takes
    checked arguments in the order of csrc/ops/schemas.cpp (`sparse_attention` takes a pattern instead of plans, and its
    options as one).

    Attributes:
        name: as in `backend="name"`.
        devices: supported device types; None: any.
        dtypes: supported dtypes; None: any floating-point dtype.
        max_head_dim: largest head dim of the attention operations; None: any.
        options: whether it supports grouped queries, keys before the first query, patterns that are not causal, text
            lengths and dropout in the attention operations.
        capturable: whether CUDA graphs can capture its operations, i.e. none synchronises with the device.
        problem: why this installation cannot run any operation, or None.
        operations: the functions by name; empty if there is a `problem`.
    """

    name: str
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = (torch.float32, torch.bfloat16, torch.float16)
    max_head_dim: int | None = 128
    options: bool = False
    capturable: bool = True
    problem: str | None = None

    def __init__(self) -> None:
        self.operations: dict[str, Callable] = {}

    def device_problem(self, operation: str, tensor: torch.Tensor) -> str | None:
        """Why the device that holds `tensor` cannot run `operation`, or None."""
        return None

    def tiles(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> Tiles | None:
        """The tile shapes of the plans for a problem; None if the backend reads no plans."""
        return None

    def reasons(self, operation: str, tensor: torch.Tensor, uses: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Why `operation` cannot run on tensors with `tensor`'s device, dtype and last dimension; empty if it can.
        `uses`: the options of the call, in words.
        """
        if self.devices is not None and tensor.device.type not in self.devices:
            return (f"it supports {' and '.join(self.devices)} tensors, not {tensor.device.type}",)
        if self.dtypes is not None and tensor.dtype not in self.dtypes:
            return (f"it supports {', '.join(str(dtype) for dtype in self.dtypes)}, not {tensor.dtype}",)
        if self.max_head_dim is not None and operation.endswith("attention") and tensor.shape[-1] > self.max_head_dim:
            return (f"it supports head dims up to {self.max_head_dim}, not {tensor.shape[-1]}",)
        if uses and not self.options:
            return (f"it does not support {' or '.join(uses)}; 'cpu' and 'reference' do",)
        problem = self.problem or self.device_problem(operation, tensor)
        return (problem,) if problem else ()

    def prepare(self, pattern: AttentionPattern, n: int, tensor: torch.Tensor) -> None:
        """Compiles and uploads the plans that `sparse_attention` reads for the first n tokens of the pattern, all of
        which are queries.
        """
        tiles = self.tiles(tensor.device, tensor.shape[-1], tensor.dtype)
        if tiles is not None:
            plan_tensors(pattern, n, tensor.device, tiles, 0)  # the arguments of a call: they are the cache's key

    def load(self) -> None:
        """Imports the operations."""
        package = type(self).__module__
        self.operations = {name: getattr(importlib.import_module(f"{package}.{name}"), name) for name in OPERATIONS}


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` with a contiguous last dimension, which the kernels require; copies only if necessary.

    No other dimension has stride 1 then, as those of overlapping windows may: the kernels' outputs, `empty_like` their
    inputs, could get that dimension as their innermost one.
    """
    strides = x.stride()
    return x if strides[-1] == 1 and 1 not in strides[:-1] else x.contiguous()
