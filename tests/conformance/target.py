"""Targets, cases, and what the checks of several operations need."""

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
    """A backend and where it runs.

    Attributes:
        backend: its name.
        device: of the tensors.
        dtypes: which of DTYPES it is checked in.
        simulated: the kernels run by emulation or interpretation: problems are small, and some cases are slow.
        kernels: there are kernels, whose bits do not depend on the batch; not so in plain PyTorch.
        compiles: whether torch.compile can trace its operations.
    """

    backend: str
    device: str = "cpu"
    dtypes: tuple[str, ...] = tuple(DTYPES)
    simulated: bool = False
    kernels: bool = True
    compiles: bool = True

    def patterns(self, dtype: str) -> tuple[str, ...]:
        """Which patterns operations are checked with in a dtype: all, or few in the slowest dtype of slow targets."""
        return ("row", "conv-clip", "mask") if self.simulated and dtype == "float32" else NAMES

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def seeds(self, *shape: int) -> torch.Tensor:
        return torch.randint(-(2**63), 2**63 - 1, shape, device=self.device)

    @contextlib.contextmanager
    def split_after(self, groups: int | None) -> Iterator[None]:
        """Within, plans split a tile after so many groups of keys; None: as they always do, which is after more keys
        than small patterns have.
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
    """A check with its arguments. `slow`: it belongs to the slow suite."""

    name: str
    check: Callable[[], None]
    slow: bool = False


class Cases:
    """Collects the cases of an operation."""

    def __init__(self, target: Target, operation: str) -> None:
        self.target, self.operation, self.list = target, operation, []

    def add(self, name: str, check: Callable, *args, slow: bool = False, rare: bool = False, **options) -> None:
        """`rare`: it is slow where the kernels are simulated."""
        check = functools.partial(check, self.target, *args, **options)
        self.list.append(Case(f"{self.operation} {name}", check, slow or (rare and self.target.simulated)))


def what(target: Target, operation: str, tensor: str, dtype: str) -> str:
    """The name of a result, in reports of its accuracy."""
    return f"{target.backend} {operation} {tensor} {dtype}"


def same(actual, expected) -> None:
    """The same bits."""
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"output {number} differs by up to {(a.double() - b.double()).abs().max():.3g}"


def captured(target: Target, step: Callable[[], list]) -> Callable[[], list]:
    """A function that replays `step`, captured as a CUDA graph, and returns its outputs; `step` itself on a CPU."""
    if torch.device(target.device).type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # plans are compiled and uploaded here
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
