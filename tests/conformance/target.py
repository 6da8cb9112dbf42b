"""Targets, cases, and helpers shared by the checks of several operations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

import dalle_kernels as dk
from dalle_kernels.backends.native.tiles import TILES
from patterns_for_tests import NAMES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Target:
    """A backend on a device.

    Attributes:
        backend: name of the backend.
        device: device of the tensors.
        dtypes: names of DTYPES to check.
        simulated: whether the kernels are emulated or interpreted: problems are small, and some cases are slow.
        kernels: whether it has kernels, which are batch-invariant; plain PyTorch is not.
        compiles: whether torch.compile can trace its operations.
    """

    backend: str
    device: str = "cpu"
    dtypes: tuple[str, ...] = tuple(DTYPES)
    simulated: bool = False
    kernels: bool = True
    compiles: bool = True

    def patterns(self, dtype: str) -> tuple[str, ...]:
        """The patterns to check in a dtype: all, or a few in all dtypes but one of slow targets."""
        return ("row", "conv-clip", "mask") if self.simulated and dtype != self.dtypes[1] else NAMES

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def seeds(self, *shape: int) -> torch.Tensor:
        return torch.randint(-(2**63), 2**63 - 1, shape, device=self.device)

    @contextlib.contextmanager
    def split_after(self, groups: int | None) -> Iterator[None]:
        """Within the block, plans split tiles after `groups` groups of keys. None: the default, which is more than
        small patterns have.
        """
        if groups is None:
            yield
        elif self.backend == "triton":
            from dalle_kernels.backends.triton import launch

            before, launch.SPLIT = launch.SPLIT, groups
            try:
                yield
            finally:
                launch.SPLIT = before
        else:
            kind = "cpu" if self.backend == "cpu" else "cuda"
            before = TILES[kind]
            TILES[kind] = type(before)(*(shape and _split(shape, groups) for shape in before))
            try:
                yield
            finally:
                TILES[kind] = before


def _split(shape, groups):
    return replace(shape, longest_run=1, split=groups, max_splits=None)


@dataclass(frozen=True)
class Case:
    """A check with its arguments. `slow`: part of the slow suite; `full`: and only of `make test-full`."""

    name: str
    check: Callable[[], None]
    slow: bool = False
    full: bool = False


class Cases:
    """Collects the cases of an operation."""

    def __init__(self, target: Target, operation: str) -> None:
        self.target, self.operation, self.list = target, operation, []

    def add(
        self, name: str, check: Callable, *args, slow: bool = False, rare: bool = False, full: bool = False, **options
    ) -> None:
        """Adds a case. `rare`: slow if the kernels are simulated; `full`: slow, and left to `make test-full`."""
        check = functools.partial(check, self.target, *args, **options)
        slow = slow or full or (rare and self.target.simulated)
        self.list.append(Case(f"{self.operation} {name}", check, slow, full))

    def completed(self, one_graph: Callable, beyond_32_bits: Callable) -> list[Case]:
        """The list, with the cases of every operation: in torch.compile, and tensors beyond 32 bits on a GPU."""
        if self.target.compiles:
            self.add("torch.compile", one_graph)
        if self.target.device != "cpu":
            self.add("beyond 32 bits", beyond_32_bits)
        return self.list


def what(target: Target, operation: str, tensor: str, dtype: str) -> str:
    """The name of a result in accuracy reports."""
    return f"{target.backend} {operation} {tensor} {dtype}"


def same(actual, expected) -> None:
    """Asserts bitwise equality."""
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"output {number} differs by up to {(a.double() - b.double()).abs().max():.3g}"


def captured(target: Target, step: Callable[[], list]) -> Callable[[], list]:
    """A function that replays `step`, captured as a CUDA graph, and returns its outputs; `step` itself on a CPU."""
    if torch.device(target.device).type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles and uploads plans
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outputs = step()

    def replay():
        graph.replay()
        return outputs

    return replay


def need_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        raise MemoryError(f"needs {gigabytes} GB of device memory, and {free:.0f} are free")


def refuses_double_backward(output: torch.Tensor, x: torch.Tensor) -> None:
    (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    try:
        grad.sum().backward()
    except NotImplementedError as error:
        assert "no double backward" in str(error)
    else:
        raise AssertionError("a second derivative was computed")


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


P = dk.AttentionPattern
