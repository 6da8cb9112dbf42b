"""Tile shapes and launch parameters of the kernels: a table by architecture, head dim and element size.

`python -m dalle_kernels.tune OPERATION` times alternatives on this machine's GPU and prints lines for TABLE. OVERRIDES
takes precedence over the table: `launch.OVERRIDES["sparse_attention"] = Launch(64, 64, 8, 3)`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ...plan import TileShape
from ..plans import Tiles

SPLIT = 16  # groups after which a tile is split between programs, so that no program runs much longer than the others


class Launch(NamedTuple):
    """How a kernel is launched."""

    rows: int  # per tile
    columns: int  # per loop iteration
    warps: int
    stages: int  # of the software pipeline: iterations in flight, including the current one

    @property
    def tile_shape(self):
        """The tile shape of the plans that such a kernel reads."""
        return TileShape(self.rows, self.columns, longest_run=1, split=SPLIT)


ANY = None  # every architecture without a line of its own

# {(architecture, head dim padded to a power of two, bytes per element): Launch}. With the lines for ANY, a block needs
# at most 99 KB of shared memory, which every NVIDIA GPU since sm_80 has, and 64 KB on AMD.
_QUERIES = {
    (ANY, 32, 2): Launch(64, 64, 4, 2),
    (ANY, 64, 2): Launch(64, 64, 4, 2),
    (ANY, 128, 2): Launch(64, 64, 8, 2),
    (ANY, 32, 4): Launch(64, 32, 4, 2),
    (ANY, 64, 4): Launch(64, 32, 8, 2),
    (ANY, 128, 4): Launch(32, 32, 8, 2),
    ("sm_100", 64, 2): Launch(64, 64, 8, 2),
    ("sm_90", 128, 2): Launch(64, 64, 4, 2),
    ("sm_100", 128, 2): Launch(64, 64, 4, 2),
    ("gfx942", 128, 2): Launch(64, 64, 4, 2),
    ("gfx942", 64, 4): Launch(64, 32, 4, 2),
    ("gfx942", 128, 4): Launch(64, 32, 4, 2),
}

TABLE = {  # by kernel
    "sparse_attention": _QUERIES,
    "sparse_attention.grad_q": _QUERIES,  # reads the same plan, so rows and columns must be the same
    "sparse_attention.grad_kv": {
        (ANY, 32, 2): Launch(64, 32, 4, 2),
        (ANY, 64, 2): Launch(64, 32, 4, 2),
        (ANY, 128, 2): Launch(64, 32, 4, 2),
        (ANY, 32, 4): Launch(64, 32, 4, 2),
        (ANY, 64, 4): Launch(64, 32, 8, 2),
        (ANY, 128, 4): Launch(32, 32, 8, 2),
        ("gfx942", 32, 4): Launch(64, 32, 4, 1),
        ("gfx942", 64, 4): Launch(64, 32, 4, 1),
        ("gfx942", 128, 4): Launch(64, 32, 4, 1),
    },
    # tiles of classes x adjacent positions; positions x classes if the classes are the last dimension
    "gumbel_softmax": {(ANY, 0, 2): Launch(128, 32, 8, 1), (ANY, 0, 4): Launch(128, 32, 8, 1)},
    "gumbel_softmax.last": {(ANY, 0, 2): Launch(1, 8192, 16, 1), (ANY, 0, 4): Launch(1, 8192, 16, 1)},
    # columns: tokens per loop iteration
    "sample_tokens": {(ANY, 0, 2): Launch(1, 8192, 16, 1), (ANY, 0, 4): Launch(1, 8192, 16, 1)},
    "decode_attention.text": {  # rows: candidates of a prompt
        (ANY, 32, 2): Launch(16, 64, 4, 2),
        (ANY, 64, 2): Launch(16, 64, 4, 2),
        (ANY, 128, 2): Launch(16, 32, 4, 2),
        (ANY, 32, 4): Launch(16, 32, 8, 2),
        (ANY, 64, 4): Launch(16, 32, 4, 2),
        (ANY, 128, 4): Launch(16, 16, 8, 2),
    },
    "decode_attention.image": {(ANY, dim, bytes): Launch(1, 32, 2, 1) for dim in (32, 64, 128) for bytes in (2, 4)},
}
OVERRIDES: dict[str, Launch] = {}


def padded(head_dim: int) -> int:
    """The head dim that a kernel is compiled for, padded with zeros; 0 for operations without a head dim."""
    return next(dim for dim in (0, 32, 64, 128) if head_dim <= dim)


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "none" without a GPU (interpreter, fake tensors)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "none"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def lookup(kernel: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> Launch:
    """The launch parameters of a kernel on `device`; OVERRIDES first, then the table."""
    return OVERRIDES.get(kernel) or in_table(kernel, architecture(device), padded(head_dim), dtype.itemsize)


def tiles(device: torch.device, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tile shapes of sparse_attention's plans."""
    kernels = "sparse_attention", "sparse_attention.grad_kv"
    return Tiles(*(lookup(kernel, device, head_dim, dtype).tile_shape for kernel in kernels))


def in_table(kernel: str, architecture: str, dim: int, bytes: int) -> Launch:
    lines = TABLE[kernel]
    return lines.get((architecture, dim, bytes)) or lines[ANY, dim, bytes]


def start(kernel, blocks, warps, stages, *arguments, **constants):
    """Launches `blocks` programs of a kernel on the device of its first argument."""
    if blocks == 0:
        return
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    with torch.cuda.device_of(first):
        kernel[(blocks,)](*arguments, **constants, num_warps=warps, num_stages=stages)
