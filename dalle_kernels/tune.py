"""Tunes the Triton kernels on this machine's GPU, and prints lines for launch.TABLE:

python -m dalle_kernels.tune OPERATION [--dtypes bfloat16] [--head-dims 64]

Operations are timed as a whole, at the paper's sizes. Kernels that read the same plan share rows and columns; warps and
stages are tuned per kernel. Most of the time is compilation: minutes per dtype and head dim.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench_cudagraph

from .backends import use_backend
from .backends.triton import launch
from .backends.triton.launch import Launch
from .decode_attention import decode_attention
from .decode_cache import DecodeCache
from .gumbel_softmax import gumbel_softmax
from .patterns import AttentionPattern
from .sample_tokens import sample_tokens
from .sparse_attention import sparse_attention

DEVICE = torch.device("cuda")

# -- problems: (dtype, head dim) -> the function to time


def attention(dtype: torch.dtype, head_dim: int) -> Callable[[], object]:
    """Attention and its gradients."""
    pattern = AttentionPattern.row(256, (32, 32))
    q, k, v, grad = torch.randn(4, 4, 16, pattern.seq_len, head_dim, dtype=dtype, device=DEVICE).unbind(0)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(sparse_attention(*inputs, pattern), inputs, grad)


def relaxation(*shape: int) -> Callable[..., Callable[[], object]]:
    def prepare(dtype: torch.dtype, head_dim: int) -> Callable[[], object]:
        """gumbel_softmax over dim 1, and its gradient."""
        logits, grad = torch.randn(2, *shape, dtype=dtype, device=DEVICE).unbind(0)
        logits.requires_grad_()
        return lambda: torch.autograd.grad(gumbel_softmax(logits, dim=1, seed=0), logits, grad)

    return prepare


def sampling(dtype: torch.dtype, head_dim: int) -> Callable[[], object]:
    logits = torch.randn(64, 8192, dtype=dtype, device=DEVICE)
    return lambda: sample_tokens(logits, top_k=256, top_p=0.9, seed=0)


def decoding(dtype: torch.dtype, head_dim: int) -> Callable[[], object]:
    """A step in the middle of an image."""
    pattern, heads, candidates, start = AttentionPattern.row(256, (32, 32)), 16, 64, 528
    sizes = dict(prompts=1, candidates=candidates, heads=heads, head_dim=head_dim, start=start)
    cache = DecodeCache([pattern], **sizes, dtype=dtype, device=DEVICE)
    cache.prefill(0, *torch.randn(2, 1, heads, 256 + start, head_dim, dtype=dtype, device=DEVICE))
    new = torch.randn(3, candidates, heads, head_dim, dtype=dtype, device=DEVICE)
    return lambda: decode_attention(*new, cache, 0)


# -- search spaces


class Group(NamedTuple):
    """Kernels that share rows and columns, and the candidate values."""

    kernels: tuple[str, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    warps: tuple[int, ...]
    stages: tuple[int, ...]

    @property
    def shapes(self) -> Iterator[tuple[int, int]]:
        return itertools.product(self.rows, self.columns)

    @property
    def schedules(self) -> Iterator[tuple[int, int]]:
        return itertools.product(self.warps, self.stages)


class Operation(NamedTuple):
    prepare: Callable
    head_dims: tuple[int, ...]
    groups: tuple[Group, ...]


SIZES, NONE = (32, 64, 128), (0,)  # head dims; 0 for operations without one
ATTENTION = SIZES, SIZES, (4, 8), (1, 2, 3)
OPERATIONS = {
    "sparse_attention": Operation(
        attention,
        SIZES,
        (
            Group(("sparse_attention", "sparse_attention.grad_q"), *ATTENTION),
            Group(("sparse_attention.grad_kv",), *ATTENTION),
        ),
    ),
    "gumbel_softmax": Operation(
        relaxation(8, 8192, 32, 32), NONE, (Group(("gumbel_softmax",), (64, 128, 256), (16, 32, 64), (4, 8, 16), (1,)),)
    ),
    "gumbel_softmax.last": Operation(
        relaxation(8192, 8192), NONE, (Group(("gumbel_softmax.last",), (1,), (2048, 4096, 8192), (4, 8, 16), (1,)),)
    ),
    "sample_tokens": Operation(
        sampling, NONE, (Group(("sample_tokens",), (1,), (1024, 2048, 4096, 8192), (4, 8, 16), (1,)),)
    ),
    "decode_attention": Operation(
        decoding,
        SIZES,
        (
            Group(("decode_attention.text",), (16, 32), SIZES, (4, 8), (1, 2, 3)),
            Group(("decode_attention.image",), (1,), SIZES, (1, 2, 4, 8), (1, 2)),
        ),
    ),
}


# -- search


def milliseconds(run: Callable[[], object]) -> float:
    """Median time in ms, infinite if the kernel exceeds the GPU's resources. In a CUDA graph, because most operations
    take less time than Python needs to launch them.
    """
    try:
        return do_bench_cudagraph(run, return_mode="median")
    except OutOfResources:  # shared memory, registers or threads
        return math.inf


def tune(group: Group, run: Callable[[], object]) -> dict[str, Launch]:
    """{kernel: the best Launch} for the kernels of a group."""
    results = []
    for shape in group.shapes:
        chosen = {kernel: Launch(*shape, *next(group.schedules)) for kernel in group.kernels}
        for kernel in group.kernels:
            times = {}
            for schedule in group.schedules:
                launch.OVERRIDES.update({**chosen, kernel: Launch(*shape, *schedule)})
                times[schedule] = milliseconds(run)
            best = min(times, key=times.get)
            chosen[kernel] = Launch(*shape, *best)
        results.append((times[best], chosen))
        print(f"{shape}: {times[best]:.3f} ms", file=sys.stderr)
    time, chosen = min(results, key=lambda result: result[0])
    if math.isinf(time):
        raise RuntimeError(f"no candidate for {' and '.join(group.kernels)} runs on this GPU")
    launch.OVERRIDES.update(chosen)
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16", "float32"))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=SIZES, default=SIZES, help="attention only")
    args = parser.parse_args(arguments)
    operation, architecture = OPERATIONS[args.operation], launch.architecture(DEVICE)
    lines = {kernel: [] for group in operation.groups for kernel in group.kernels}
    head_dims = [dim for dim in operation.head_dims if dim in (0, *args.head_dims)]
    for name, head_dim in itertools.product(args.dtypes, head_dims):
        dtype = getattr(torch, name)
        launch.OVERRIDES.clear()
        with use_backend("triton"):
            run = operation.prepare(dtype, head_dim)
            for group in operation.groups:
                for kernel, best in tune(group, run).items():
                    lines[kernel].append(f"        {(architecture, head_dim, dtype.itemsize)}: Launch{tuple(best)},")
    for kernel, found in lines.items():
        print(f'    "{kernel}": {{', *found, "    },", sep="\n")


if __name__ == "__main__":
    main()
