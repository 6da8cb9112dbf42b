"""sparse_attention against dense and masked attention, and FlexAttention with the pattern as its mask_mod."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

from common.attention import PATTERNS, Case, Inputs, flex, shrink
from common.timing import Unavailable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_kernels as dk

from .timing import compare

P = dk.AttentionPattern
DIRECTIONS = ("forward", "backward")
BLOCKS = (128, 64)  # block sizes of FlexAttention's mask; 128 is its default


def items(setting, timer, bandwidth):
    main = [Case(pattern, direction) for pattern in PATTERNS for direction in DIRECTIONS]
    sweep = [replace(case, batch=batch) for batch in (1, 64) for case in main]
    sweep += [replace(case, dim=128) for case in main]
    sweep += [replace(case, grid=(64, 64), batch=4) for case in main]
    if setting.long:
        sizes = itertools.product(((32, 32), (64, 64)), (64, 128), (1, 4, 16, 64), ("bfloat16", "float16", "float32"))
        all_sizes = [
            replace(case, grid=grid, dim=dim, batch=batch, dtype=dtype)
            for grid, dim, batch, dtype in sizes
            for case in main
        ]
        sweep += [case for case in all_sizes if case not in (*main, *sweep)]
    compiled = [(pattern, "raster") for pattern in PATTERNS] + [("column", "ordered")]
    if setting.tiny:
        main, sweep = [shrink(case) for case in main], []
    return {
        "main": [(str(case), lambda case=case: [against_sdpa(case, setting, timer)]) for case in main],
        "compiled": [
            (f"attention {pattern} FlexAttention {order}", lambda c=(pattern, order): against_flex(*c, setting, timer))
            for pattern, order in compiled
        ],
        "sweep": [(str(case), lambda case=case: [against_sdpa(case, setting, timer)]) for case in sweep],
    }


def against_sdpa(case, setting, timer):
    inputs = Inputs(case, setting.device)
    mask = inputs.pattern.dense().to(setting.device)
    baselines = {
        "cuDNN causal": lambda: causal(SDPBackend.CUDNN_ATTENTION, setting, inputs),
        "flash causal": lambda: causal(SDPBackend.FLASH_ATTENTION, setting, inputs),
        "masked SDPA": lambda: inputs.function(lambda q, k, v: sdpa(q, k, v, attn_mask=mask)),
    }
    return row(case, inputs, compare(timer, ours(inputs, setting), baselines))


def against_flex(name, order, setting, timer):
    """Forward and backward share compiled code. "ordered": the tokens are in the pattern's order; reordering is not
    timed."""
    for direction in DIRECTIONS:
        case = Case(name, direction)
        inputs = Inputs(shrink(case) if setting.tiny else case, setting.device, autograd=setting.on_gpu)
        blocks = {str(block): functools.partial(flex, inputs, order, block, setting) for block in BLOCKS}
        result = compare(timer, ours(inputs, setting), blocks)
        yield row(inputs.case, inputs, best_of(result, list(blocks), f"FlexAttention {order}"))


def best_of(result, names, name):
    """The result with the fastest of the baselines `names` under one `name`; all of them stay under "all"."""
    times = result["times"]
    best = min(names, key=lambda n: times[n]["ms"][1] if "ms" in times[n] else float("inf"))
    kept = {key: value for key, value in times.items() if key not in names}
    return {
        "times": {**kept, name: {"block": best, **times[best]}},
        "ratios": {ours: {name: others[best]} if best in others else {} for ours, others in result["ratios"].items()},
        "all": {n: times[n] for n in names},
    }


def ours(inputs, setting):
    def on(backend):
        return inputs.function(lambda q, k, v: dk.sparse_attention(q, k, v, inputs.pattern, backend=backend))

    return {backend: lambda backend=backend: on(backend) for backend in setting.backends()}


def causal(backend, setting, inputs):
    if not setting.on_gpu:
        raise Unavailable("needs CUDA")

    def attention(q, k, v):
        with sdpa_kernel(backend):
            return sdpa(q, k, v, is_causal=True)

    return inputs.function(attention)


def row(case, inputs, result):
    """A row of results. TFLOP/s count the allowed pairs only: 4 operations per pair and channel, 10 in the backward
    pass."""
    pairs = inputs.pattern.nnz
    flops = (10 if inputs.backward else 4) * case.batch * case.heads * pairs * case.dim
    for times in result["times"].values():
        if "ms" in times:
            times["TFLOP/s"] = flops / times["ms"][1] / 1e9
    ceiling = P.causal(case.text, case.grid).nnz / pairs
    return {
        "op": "sparse_attention",
        "case": f"{case.pattern}, {'×'.join(map(str, case.grid))}, dim {case.dim}, batch {case.batch}, {case.dtype}",
        "pass": case.direction,
        "pairs": pairs,
        "ceiling": ceiling,
        **{name: getattr(case, name) for name in ("pattern", "grid", "dim", "batch", "heads", "dtype")},
        **result,
        "share of ceiling": {
            name: others["cuDNN causal"]["warm"][1] / ceiling
            for name, others in result["ratios"].items()
            if "cuDNN causal" in others
        },
    }
