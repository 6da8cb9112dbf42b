"""Measures on the GPU at hand how kernels are best cut and launched, and prints lines for launch.TABLE:

python -m dalle_kernels.backends.triton.tune OPERATION

The operation is timed as a whole, in bfloat16 and float32, at the paper's size. Kernels that read the same plan share
rows and columns; warps and stages are each kernel's own.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from ...patterns import AttentionPattern
from ...sparse_attention import sparse_attention
from . import launch
from .launch import Launch

SHAPES = tuple(itertools.product((32, 64, 128), (32, 64, 128)))  # rows, columns
SCHEDULES = tuple(itertools.product((4, 8), (1, 2, 3)))  # warps, stages


def attention(dtype, head_dim):
    """A function that runs attention and its gradients."""
    pattern = AttentionPattern.row(256, (32, 32))
    shape = 4, 16, pattern.seq_len, head_dim
    q, k, v = (torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, dtype=dtype, device="cuda")
    return lambda: torch.autograd.grad(sparse_attention(q, k, v, pattern, backend="triton"), (q, k, v), grad)


# operation: (what is run, head dims, groups of kernels that share rows and columns)
OPERATIONS = {
    "sparse_attention": (
        attention,
        (32, 64, 128),
        (("sparse_attention", "sparse_attention.grad_q"), ("sparse_attention.grad_kv",)),
    ),
}


def milliseconds(run):
    try:
        return do_bench(run, return_mode="median")
    except OutOfResources:  # of shared memory, or threads
        return math.inf


def tune(kernels, run):
    """{kernel: the best Launch} of kernels that share rows and columns."""
    results = []
    for shape in SHAPES:
        chosen = {kernel: Launch(*shape, 4, 2) for kernel in kernels}
        for kernel in kernels:
            times = {}
            for schedule in SCHEDULES:
                launch.OVERRIDES.update({**chosen, kernel: Launch(*shape, *schedule)})
                times[schedule] = milliseconds(run)
            best = min(times, key=times.get)
            chosen[kernel] = Launch(*shape, *best)
        results.append((times[best], chosen))
        print(f"{shape}: {times[best]:.3f} ms", file=sys.stderr)
    chosen = min(results, key=lambda result: result[0])[1]
    launch.OVERRIDES.update(chosen)
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operation", choices=OPERATIONS)
    prepare, head_dims, groups = OPERATIONS[parser.parse_args().operation]
    architecture = launch.architecture(torch.device("cuda", torch.cuda.current_device()))
    lines = {kernel: [] for group in groups for kernel in group}
    for dtype, head_dim in itertools.product((torch.bfloat16, torch.float32), head_dims):
        launch.OVERRIDES.clear()
        run = prepare(dtype, head_dim)
        for group in groups:
            for kernel, best in tune(group, run).items():
                lines[kernel].append(f"        {(architecture, head_dim, dtype.itemsize)}: Launch{tuple(best)},")
    for kernel, found in lines.items():
        print(f'    "{kernel}": {{', *found, "    },", sep="\n")


if __name__ == "__main__":
    main()
