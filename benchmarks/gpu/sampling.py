"""sample_tokens against plain PyTorch."""

from __future__ import annotations

import torch

import dalle_kernels as dk

from .timing import compare

SHAPES = ((512, 8192), (64, 16384))
FILTERS = {"all": {}, "top_k=256": {"top_k": 256}, "top_p=0.9": {"top_p": 0.9}, "both": {"top_k": 256, "top_p": 0.9}}


def items(setting, timer, bandwidth):
    shapes = [(3, 300)] if setting.tiny else SHAPES
    dtypes = ("float32", "bfloat16", "float16") if setting.long else ("float32",)
    return {
        "main": [
            (f"sample {list(shape)} {name} {dtype}",
             lambda c=(shape, name, dtype): [row(*c, setting, timer, bandwidth)])
            for shape in shapes
            for dtype in dtypes
            for name in FILTERS
        ]
    }  # fmt: skip


def row(shape, name, dtype, setting, timer, bandwidth):
    options = FILTERS[name]
    logits = torch.randn(shape, device=setting.device, dtype=getattr(torch, dtype))
    seeds = torch.randint(2**62, shape[:1], device=setting.device)

    def on(backend):
        return lambda: dk.sample_tokens(logits, seed=seeds, offset=7, backend=backend, **options)

    ours = {backend: lambda backend=backend: on(backend) for backend in setting.backends()}
    with torch.inference_mode():
        result = compare(timer, ours, {"plain PyTorch": lambda: lambda: plain(logits, **options)})
    for times in result["times"].values():
        if "ms" in times:
            times["of copy bandwidth"] = logits.nbytes / times["cold ms"][1] * 1e3 / bandwidth
    return {"op": "sample_tokens", "case": f"{list(shape)}, {name}, {dtype}", "pass": "forward", **result}


def plain(logits, top_k=None, top_p=None):
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    p = logits.float().softmax(-1)
    if top_p is not None:
        ordered, tokens = p.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        p = torch.zeros_like(p).scatter(-1, tokens, ordered.masked_fill(before >= top_p, 0.0))
    return (p / torch.empty_like(p).exponential_()).argmax(-1)  # torch.multinomial would synchronise
