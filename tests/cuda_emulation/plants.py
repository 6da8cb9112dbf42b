"""Faults to plant in the CUDA kernels, and the one small case of each operation that must find them.

python plants.py OPERATION CSRC OBJECTS runs the case on the kernels in CSRC and prints what is found, or nothing.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

if __name__ == "__main__":  # run on its own: the tests' modules, beside this package
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import dalle_kernels as dk
    from cuda_emulation import emulated


@dataclass(frozen=True)
class Plant:
    """A fault: in `file` of csrc, `old`, which stands there once, becomes `new`. Running the case of `operation` must
    then say `caught`, a report of the emulation or a failed comparison with float64.
    """

    operation: str
    name: str
    file: str
    old: str
    new: str
    caught: str


INACCURATE = "AssertionError"


def sample_tokens():
    from test_cuda_sample_tokens import check, random_logits

    for dtype in (torch.float32, torch.bfloat16):
        check(random_logits(40, 300, dtype), top_k=30, top_p=0.9)
        check(random_logits(40, 203, dtype))


def decode_attention():
    from test_cuda_decode_attention import check
    from test_decode_attention import make

    for dtype in (torch.float32, torch.bfloat16):
        pattern = dk.AttentionPattern.column(150, (2, 6))
        check(pattern, *make(pattern, 2, 5, 1, 64, dtype, 7), 2, 7, steps=3)


# The files of an operation, and what runs it.
CASES = {
    "sample_tokens": (("sample_tokens",), sample_tokens),
    "decode_attention": (("decode_attention",), decode_attention),
}

SAMPLE = "cuda/sample_tokens.cu"
DECODE = "cuda/decode_attention.cu"
PLANTS = [
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
        "a warp too few in the reduction",
        SAMPLE,
        "lane < WARPS ?",
        "lane < WARPS - 1 ?",
        INACCURATE,
    ),
    Plant(
        "sample_tokens",
        "quads overlap those of the neighbour",
        SAMPLE,
        "sts16(smem + quad * 16",
        "sts16(smem + (quad ^ 1) * 16",
        "without a barrier",
    ),
    Plant(
        "sample_tokens",
        "row read beyond its end",
        SAMPLE,
        "i < left ? key_of",
        "i <= left ? key_of",
        INACCURATE,
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
        "    DK_UNROLL\n    for (int lanes = Shape<T, D>::LANES; lanes < 32; lanes *= 2) {",
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
        "dev::sts_f32(a + D * 4 + 4, sum);\n    dev::syncwarp();",
        "dev::sts_f32(a + D * 4 + 4, sum);",
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
        "column[2 * half] *= keep, column[2 * half + 1] *= keep;",
        "column[2 * half] *= keep;",
        INACCURATE,
    ),
    Plant(
        "decode_attention",
        "off-by-one row",
        DECODE,
        "list + (i < count ? i : count - 1) * 4",
        "list + (i < count - 1 ? i : count - 1) * 4",
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


def main():
    operation, csrc, objects = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    files, case = CASES[operation]
    path = emulated.compile_library(csrc, objects, only=files)
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    emulated.library = lambda: library
    try:
        case()
    except AssertionError as error:  # an EmulationError is one
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
