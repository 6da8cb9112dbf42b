"""Faults to inject into the CUDA kernels, and one small case per operation that must detect them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

import conformance.decode_attention
import dalle_kernels as dk
from accuracy import mostly
from conformance import Target
from cuda_emulation import emulated
from cuda_emulation.backend import EMULATED
from dalle_kernels.backends import BACKENDS


@dataclass(frozen=True)
class Plant:
    """A fault: in csrc/`file`, `old`, which occurs once, is replaced with `new`. The case of `operation` must then fail
    with `caught`, a report of the emulation or a failed comparison with float64.
    """

    operation: str
    name: str
    file: str
    old: str
    new: str
    caught: str


INACCURATE = "a failed comparison"


TARGET = Target("emulated", simulated=True)


def sample_tokens():
    for dtype in ("float32", "bfloat16"):
        conformance.sample_tokens.definition(TARGET, dtype, 12, 300, filters=({"top_k": 30, "top_p": 0.9},))
        conformance.sample_tokens.definition(TARGET, dtype, 12, 203, filters=({},))


def decode_attention():
    pattern = dk.AttentionPattern.column(150, (2, 6))
    for dtype in ("float32", "bfloat16"):
        sizes = dict(prompts=2, candidates=5, heads=1, dim=64, start=9)
        conformance.decode_attention.accuracy(TARGET, pattern, dtype, **sizes)


def sparse_attention():
    for name, dtype, sizes in (
        ("conv-clip", "bfloat16", dict(dim=64)),
        ("row", "float16", dict(dim=40, split=1)),
        ("row", "float32", dict(dim=32)),  # several entries of a tile, one after the other
        ("row", "float32", dict(dim=32, split=1)),
    ):
        conformance.sparse_attention.accuracy(TARGET, name, dtype, **sizes)


def gumbel_softmax():
    for dtype in ("float32", "bfloat16"):
        conformance.gumbel_softmax.accuracy(TARGET, dtype, False, (2, 40, 5, 5), 1, taus=(0.7,))
        conformance.gumbel_softmax.accuracy(TARGET, dtype, True, (1, 3000, 3, 3), 1, taus=(0.7,))  # a cluster of blocks


ATTENTION_FILES = ("sparse_attention", "sparse_attention_backward")
GUMBEL_FILES = ("gumbel_softmax", "gumbel_softmax_backward")
# The files of an operation, and what runs it.
CASES = {
    "sparse_attention": (ATTENTION_FILES, sparse_attention),
    "sparse_attention_backward": (ATTENTION_FILES, sparse_attention),
    "gumbel_softmax": (GUMBEL_FILES, gumbel_softmax),
    "sample_tokens": (("sample_tokens",), sample_tokens),
    "decode_attention": (("decode_attention",), decode_attention),
}

FORWARD = "cuda/sparse_attention.cu"
BACKWARD = "cuda/sparse_attention_backward.cu"
SWEEP = "cuda/gumbel_sweep.h"
SAMPLE = "cuda/sample_tokens.cu"
DECODE = "cuda/decode_attention.cu"
PLANTS = [
    Plant(
        "sparse_attention",
        "missing barrier in the loop",
        FORWARD,
        "    dev::syncthreads();   // entry e has landed, and the other stage is free\n",
        "",
        "without a barrier",
    ),
    Plant(
        "sparse_attention",
        "short wait",
        FORWARD,
        "dev::cp_async_wait<0>();\n    dev::syncthreads();   // entry e",
        "dev::cp_async_wait<1>();\n    dev::syncthreads();   // entry e",
        "with a cp.async in flight",
    ),
    Plant(
        "sparse_attention",
        "missing commit",
        FORWARD,
        "    copy_entry(e + 1);\n    dev::cp_async_commit();",
        "    copy_entry(e + 1);",
        "cp.async",
    ),
    Plant(
        "sparse_attention",
        "wrong mask bit",
        FORWARD,
        "const uint32_t first = words.x >>",
        "const uint32_t first = words.y >>",
        INACCURATE,
    ),
    Plant(
        "sparse_attention",
        "keys of neighbours exchanged",
        FORWARD,
        "plan.column(keys_ahead, Share::row(i))",
        "plan.column(keys_ahead, Share::row(i) ^ 1)",
        INACCURATE,
    ),
    Plant(
        "sparse_attention",
        "wrong swizzle on read",
        FORWARD,
        "dev::lds16(stages + Tile<D>::at(row, chunk))",
        "dev::lds16(stages + (row * Tile<D>::CHUNKS + chunk) * 16)",
        INACCURATE,
    ),
    Plant(
        "sparse_attention",
        "swapped fragment registers",
        FORWARD,
        "dev::mma(T{}, left, q[i], b[0], b[1]);",
        "dev::mma(T{}, left, q[i], b[1], b[0]);",
        INACCURATE,
    ),
    Plant(
        "sparse_attention",
        "unwritten output",
        FORWARD,
        "if (t == 0 && token >= 0) dev::stg(p.a.lse",
        "if (t == 0 && token > 0) dev::stg(p.a.lse",
        "elements were not written",
    ),
    Plant(
        "sparse_attention",
        "shared memory too small",
        FORWARD,
        "SMEM = 2 * STAGE;",
        "SMEM = 2 * STAGE - MASK_BYTES;",
        "shared memory out of bounds",
    ),
    Plant(
        "sparse_attention",
        "lane-dependent branch around a collective",
        FORWARD,
        "      if (!computed) continue;",
        "      if (!computed || lane == 31) continue;",
        "divergent collective",
    ),
    Plant(
        "sparse_attention",
        "wrong rescale of the softmax",
        FORWARD,
        "      sum[r] *= alpha;\n",
        "",
        INACCURATE,
    ),
    Plant(
        "sparse_attention",
        "missing barrier of a warp",
        FORWARD,
        "    dev::syncwarp();\n    uint16_t* out",
        "    uint16_t* out",
        "without a barrier",
    ),
    Plant(
        "sparse_attention",
        "missing barrier before a stage is used again",
        FORWARD,
        "    dev::syncthreads();   // the stages are free\n",
        "",
        "without a barrier",
    ),
    Plant(
        "sparse_attention",
        "float32: values overwritten while they are read",
        FORWARD,
        "    dev::syncthreads();   // values and weights have been read\n",
        "",
        "without a barrier",
    ),
    Plant(
        "sparse_attention",
        "float32: weights read before they are there",
        FORWARD,
        "    dev::syncthreads();   // values have landed, weights are stored\n",
        "",
        "without a barrier",
    ),
    Plant(
        "sparse_attention",
        "float32: off-by-one row",
        FORWARD,
        "base + (tokens[i] < 0 ? 0 : tokens[i]) * stride",
        "base + (tokens[i] < 0 ? 0 : tokens[i] + 1) * stride",
        "global memory out of bounds",
    ),
    Plant(
        "sparse_attention",
        "partial maxima of other rows",
        FORWARD,
        "dev::stg(partial.max(row), max[r])",
        "dev::stg(partial.max(row ^ 1), max[r])",
        INACCURATE,
    ),
    Plant(
        "sparse_attention_backward",
        "missing barrier in the loop",
        BACKWARD,
        "      dev::syncthreads();        // ... those of all threads, and the other stage is free\n",
        "",
        "without a barrier",
    ),
    Plant(
        "sparse_attention_backward",
        "short wait",
        BACKWARD,
        "dev::cp_async_wait<0>();   // this step's",
        "dev::cp_async_wait<1>();   // this step's",
        "with a cp.async in flight",
    ),
    Plant(
        "sparse_attention_backward",
        "missing commit",
        BACKWARD,
        "copy(step + 1);\n      dev::cp_async_commit();",
        "copy(step + 1);",
        "cp.async",
    ),
    Plant(
        "sparse_attention_backward",
        "one stage",
        BACKWARD,
        "STAGES = 2;",
        "STAGES = 1;",
        "without a barrier",
    ),
    Plant(
        "sparse_attention_backward",
        "swapped fragment registers",
        BACKWARD,
        "dev::mma(T{}, s[1], a, b[2], b[3]);",
        "dev::mma(T{}, s[1], a, b[3], b[2]);",
        INACCURATE,
    ),
    Plant(
        "sparse_attention_backward",
        "missing barrier of a warp",
        BACKWARD,
        "  dev::syncwarp();   // these rows of the tile have been read\n",
        "",
        "without a barrier",
    ),
    Plant(
        "sparse_attention_backward",
        "delta left out",
        BACKWARD,
        "grad = weight * (grad - q.delta);",
        "grad = weight * grad;",
        INACCURATE,
    ),
    Plant(
        "sparse_attention_backward",
        "wrong mask word",
        BACKWARD,
        "(e ? words.y : words.x)",
        "(e ? words.x : words.y)",
        INACCURATE,
    ),
    Plant(
        "gumbel_softmax",
        "missing barrier of a cluster",
        SWEEP,
        "    const int tid = dev::tid();\n    dev::cluster_sync();",
        "    const int tid = dev::tid();",
        "another block",
    ),
    Plant(
        "gumbel_softmax",
        "missing last barrier of a cluster",
        SWEEP,
        "put(at(whole, 0, tid), a);\n    }\n    dev::cluster_sync();",
        "put(at(whole, 0, tid), a);\n    }",
        "without a barrier",
    ),
    Plant(
        "gumbel_softmax",
        "missing barrier of a block",
        SWEEP,
        "if (column < width) put(at(warps, warp, column), v[i]);\n    }\n    dev::syncthreads();",
        "if (column < width) put(at(warps, warp, column), v[i]);\n    }",
        "without a barrier",
    ),
    Plant(
        "gumbel_softmax",
        "always the first block's numbers",
        SWEEP,
        "get(static_cast<uint32_t>(c / s.chunks_per_block),",
        "get(0u,",
        INACCURATE,
    ),
    Plant(
        "gumbel_softmax",
        "noise of another position",
        SWEEP,
        "const int skip = static_cast<int>(at % 4);",
        "const int skip = 0;",
        INACCURATE,
    ),
    Plant(
        "gumbel_softmax",
        "kept elements overwritten",
        SWEEP,
        "(chunk * s.rounds + round) * s.threads",
        "chunk * s.rounds * s.threads",
        INACCURATE,
    ),
    Plant(
        "sample_tokens",
        "reductions share one area",
        SAMPLE,
        "turn ^= 1;",
        "",
        "without a barrier",
    ),
    Plant(
        "sample_tokens",
        "missing barrier",
        SAMPLE,
        "    dev::syncthreads();\n    bits = lane",
        "    bits = lane",
        "without a barrier",
    ),
    Plant(
        "sample_tokens",
        "warps left out of the reduction",
        SAMPLE,
        "lane < WARPS ?",
        "lane < 2 ?",
        INACCURATE,
    ),
    Plant(
        "sample_tokens",
        "quads overlap those of the neighbour",
        SAMPLE,
        "sts16(smem + quad * 16",
        "sts16(smem + (quad ^ 1) * 16",
        "uninitialised",
    ),
    Plant(
        "sample_tokens",
        "row read beyond its end",
        SAMPLE,
        "i < remaining ? key_of",
        "i <= remaining ? key_of",
        "global memory out of bounds",
    ),
    Plant(
        "sample_tokens",
        "noise of another row",
        SAMPLE,
        "dev::ldg(a.seed + index)",
        "dev::ldg(a.seed + (index ^ 1))",
        INACCURATE,
    ),
    Plant(
        "sample_tokens",
        "too little shared memory",
        SAMPLE,
        "const int64_t bytes = Reduce::BYTES + ",
        "const int64_t bytes = ",
        "shared memory out of bounds",
    ),
    Plant(
        "sample_tokens",
        "unwritten output",
        SAMPLE,
        "if (dev::tid() == 0) dev::stg(a.tokens",
        "if (dev::tid() == 0 && index) dev::stg(a.tokens",
        "elements were not written",
    ),
    Plant(
        "decode_attention",
        "lanes leave before a collective",
        DECODE,
        "    DK_UNROLL_FOR (int lanes = Shape<T, D>::LANES; lanes < 32; lanes *= 2) {",
        "    for (int lanes = Shape<T, D>::LANES; lanes < (dev::tid() % 32 < 8 ? 32 : 0); lanes *= 2) {",
        "deadlock",
    ),
    Plant(
        "decode_attention",
        "missing barrier after the list of keys",
        DECODE,
        "    dev::syncthreads();\n    body(count);",
        "    body(count);",
        "without a barrier",
    ),
    Plant(
        "decode_attention",
        "missing barrier before the list is used again",
        DECODE,
        "    body(count);\n    dev::syncthreads();",
        "    body(count);",
        "without a barrier",
    ),
    Plant(
        "decode_attention",
        "missing barrier of a warp",
        DECODE,
        "void save(uint32_t a) const {\n    dev::syncwarp();",
        "void save(uint32_t a) const {",
        "without a barrier",
    ),
    Plant(
        "decode_attention",
        "missing barrier before the text's states are merged",
        DECODE,
        "all.save(states + warp * CANDIDATES * S::STATE);\n    dev::syncthreads();",
        "all.save(states + warp * CANDIDATES * S::STATE);",
        "without a barrier",
    ),
    Plant(
        "decode_attention",
        "swapped fragment registers",
        DECODE,
        "dev::mma(T{}, s[t], q[2 * b], w.x, w.y);",
        "dev::mma(T{}, s[t], q[2 * b], w.y, w.x);",
        INACCURATE,
    ),
    Plant(
        "decode_attention",
        "wrong rescale of the softmax",
        DECODE,
        "column[2 * half] *= alpha, column[2 * half + 1] *= alpha;",
        "column[2 * half] *= alpha;",
        INACCURATE,
    ),
    Plant(
        "decode_attention",
        "off-by-one row",
        DECODE,
        "place(list, first + 8 * t + g, count)",
        "place(list, first + 8 * t + g + 1, count)",
        INACCURATE,
    ),
    Plant(
        "decode_attention",
        "states too close",
        DECODE,
        "STATE = (D + 4) * 4;",
        "STATE = D * 4;",
        "without a barrier",
    ),
]


def report(operation: str, csrc: Path, objects: Path) -> str:
    """What an operation's case finds in the kernels in `csrc`, or nothing. Loads them, once in a process."""
    torch.set_num_threads(1)
    files, case = CASES[operation]
    path = emulated.compile_library(csrc, objects, only=files)
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    emulated.library = lambda: library
    BACKENDS["emulated"] = EMULATED
    try:
        mostly(case)
    except emulated.EmulationError as error:
        return str(error)
    except AssertionError as error:
        return f"{INACCURATE}: {error}"
    return ""
