"""decode_attention, one step of one layer, against SDPA over padded caches with the pattern as a mask."""

from __future__ import annotations

import functools

import torch
from common.baselines import PaddedCache

import dalle_kernels as dk
from dalle_kernels.decode_schedule import compile_schedule

from .timing import compare

P = dk.AttentionPattern
PATTERNS = {"row": P.row, "column": P.column, "conv": P.conv}
CANDIDATES = (512, 64, 8, 1)


def items(setting, timer, bandwidth):
    candidates = (3,) if setting.tiny else CANDIDATES
    dtypes = ("bfloat16", "float16", "float32") if setting.long else ("bfloat16",)
    return {
        "main": [
            (f"decode {name} {count} candidates {dtype}",
             lambda c=(name, count, dtype): [row(*c, setting, timer, bandwidth)])
            for dtype in dtypes
            for count in candidates
            for name in PATTERNS
        ]
    }  # fmt: skip


def row(name, candidates, dtype, setting, timer, bandwidth):
    text, grid, heads, dim = (4, (4, 4), 2, 16) if setting.tiny else (256, (32, 32), 16, 64)
    pattern = PATTERNS[name](text, grid)
    step = grid[0] * grid[1] // 2 + grid[1] // 2  # in the middle of the image
    make = dict(device=setting.device, dtype=getattr(torch, dtype))
    new = torch.randn(3, candidates, heads, dim, **make).unbind(0)

    def filled(make_cache):
        sizes = dict(prompts=1, candidates=candidates, heads=heads, head_dim=dim, start=step)
        cache = make_cache([pattern], **sizes, **make)
        cache.prefill(0, *torch.randn(2, 1, heads, text + step, dim, **make))
        return cache

    def on(backend):
        cache = filled(dk.DecodeCache)
        return lambda: dk.decode_attention(*new, cache, 0, backend=backend)

    def padded():
        cache = filled(functools.partial(PaddedCache, masked=True))
        return lambda: cache.attend(*new, 0)

    with torch.inference_mode():
        ours = {backend: lambda backend=backend: on(backend) for backend in setting.backends()}
        result = compare(timer, ours, {"padded SDPA": padded})
    moved = bytes_moved(pattern, step, candidates, heads, dim, new[0].element_size())
    for times in result["times"].values():
        if "ms" in times:
            times["of copy bandwidth"] = moved / times["cold ms"][1] * 1e3 / bandwidth
    return {
        "op": "decode_attention",
        "case": f"{name}, {candidates} candidates, {dtype}",
        "pass": "forward",
        "candidates": candidates,
        "pattern": name,
        "bytes": moved,
        **result,
    }


def bytes_moved(pattern, step, candidates, heads, dim, element_size) -> int:
    """Minimum memory traffic of a step in bytes: keys and values of the text once for all candidates, those of the
    image (the new ones are written, not read), q, k, v and the output."""
    schedule = compile_schedule(pattern)
    text, image = len(schedule.text_keys(step)), len(schedule.image_slots(step))
    vectors = 2 * text + candidates * (2 * (image - 1) + 2 + 4)
    return vectors * heads * dim * element_size
