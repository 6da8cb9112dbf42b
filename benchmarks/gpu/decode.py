"""decode_attention, one step of one layer, against SDPA over padded caches with the pattern as a mask."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

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
    step = grid[0] * grid[1] // 2 + grid[1] // 2  # in the middle of the picture
    make = dict(device=setting.device, dtype=getattr(torch, dtype))
    new = torch.randn(3, candidates, heads, dim, **make).unbind(0)

    def on(backend):
        sizes = dict(prompts=1, candidates=candidates, heads=heads, head_dim=dim, start=step)
        cache = dk.DecodeCache([pattern], **sizes, **make)
        cache.prefill(0, *torch.randn(2, 1, heads, text + step, dim, **make))

        def attend():
            with dk.use_backend(backend):
                return dk.decode_attention(*new, cache, 0)

        return attend

    def padded():
        token = text + step
        key, value = torch.randn(2, candidates, heads, pattern.seq_len, dim, **make).unbind(0)
        mask = pattern.dense(token, token + 1).to(setting.device)
        q, k, v = (x[:, :, None] for x in new)

        def attend():
            key[:, :, token : token + 1] = k
            value[:, :, token : token + 1] = v
            return sdpa(q, key, value, attn_mask=mask)

        return attend

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
    """The least that a step moves: keys and values of the text once for all candidates, those of the image (the new
    ones are written, not read), q, k, v and the output."""
    schedule = compile_schedule(pattern)
    text, image = len(schedule.text_keys(step)), len(schedule.image_slots(step))
    vectors = 2 * text + candidates * (2 * (image - 1) + 2 + 4)
    return vectors * heads * dim * element_size
