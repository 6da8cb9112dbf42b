"""gumbel_softmax over the vocabulary of the published dVAE, dim 1 of [B, 8192, 32, 32], against
F.gumbel_softmax, eager and compiled, and against a copy of the same bytes.
"""

from __future__ import annotations

import torch
from common.timing import Unavailable
from torch.nn.functional import gumbel_softmax

import dalle_kernels as dk

from .timing import compare

TAU = 0.9
DIRECTIONS = ("forward", "forward and backward", "forward with KL")
TENSORS = {"forward": 2, "forward and backward": 5, "forward with KL": 2}  # minimum number of tensor reads and writes


def items(setting, timer, bandwidth):
    def rows(cases, compiled):
        return [
            (f"gumbel {direction} batch {batch} {dtype}{' compiled' if compiled else ''}",
             lambda case=(direction, batch, dtype): [row(*case, compiled, setting, timer, bandwidth)])
            for direction, batch, dtype in cases
        ]  # fmt: skip

    dtypes = ["float32", "bfloat16", *(["float16"] if setting.long else [])]
    batches = [1] if setting.tiny else [8, 2]
    every = [(direction, batch, dtype) for dtype in dtypes for batch in batches for direction in DIRECTIONS]
    return {
        "main": rows(every, False),
        "compiled": rows([case for case in every if case[1] == batches[0] and "KL" not in case[0]], True),
    }


def row(direction, batch, dtype, compiled, setting, timer, bandwidth):
    shape = (batch, 16, 2, 2) if setting.tiny else (batch, 8192, 32, 32)
    make = dict(device=setting.device, dtype=getattr(torch, dtype))
    logits = torch.randn(shape, **make).requires_grad_("backward" in direction)
    grad = torch.randn(shape, **make)
    plain = torch.compile(eager, dynamic=False) if compiled and setting.on_gpu else eager

    def passes(function):
        if "backward" in direction:
            return lambda: torch.autograd.grad(function(logits), logits, grad)

        @torch.inference_mode()
        def forward():
            return function(logits)

        return forward

    def on(backend):
        return lambda x: dk.gumbel_softmax(x, TAU, dim=1, return_kl="KL" in direction, backend=backend)

    def baseline():
        if compiled and not setting.on_gpu:
            raise Unavailable("is compared on CUDA only")
        return passes(plain)

    bytes_moved = TENSORS[direction] * logits.nbytes
    source = torch.randn(bytes_moved // 8, device=setting.device)
    target = torch.empty_like(source)
    baselines = {
        f"F.gumbel_softmax {'compiled' if compiled else 'eager'}": baseline,
        "copy of the same bytes": lambda: lambda: target.copy_(source),
    }
    ours = {backend: lambda backend=backend: passes(on(backend)) for backend in setting.backends()}
    result = compare(timer, ours, baselines)
    for times in result["times"].values():
        if "ms" in times:
            times["GB/s"] = bytes_moved / times["cold ms"][1] / 1e6
            times["of copy bandwidth"] = times["GB/s"] * 1e9 / bandwidth
    return {
        "op": "gumbel_softmax",
        "case": f"{list(shape)}, {dtype}",
        "pass": direction,
        "bytes": bytes_moved,
        **result,
    }


def eager(logits):
    return gumbel_softmax(logits, TAU, dim=1)
