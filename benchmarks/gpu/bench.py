"""Stage bench: operations against their baselines. The most important rows come first, compiled baselines later."""

from . import attention, decode, gumbel, sampling
from .timing import copy_bandwidth, make_timer


def items(setting):
    timer = make_timer(setting)
    bandwidth = copy_bandwidth(timer, setting.on_gpu)
    parts = [module.items(setting, timer, bandwidth) for module in (attention, gumbel, decode, sampling)]
    yield "ceilings", lambda: [ceilings(setting, timer, bandwidth)]
    for group in ("main", "compiled", "sweep"):
        for part in parts:
            yield from part.get(group, [])


def ceilings(setting, timer, bandwidth):
    """The machine's achievable peaks: device-to-device copies, and matrix products in bfloat16."""
    import torch

    n = 8192 if setting.on_gpu else 64
    a, b = torch.randn(2, n, n, device=setting.device).to(torch.bfloat16)
    with timer.session():
        sample = timer.prepare(lambda: a @ b)
        seconds = sorted(sample.warm() for _ in range(timer.rounds))[timer.rounds // 2]
    return {"copy, GB/s": bandwidth / 1e9, "bfloat16 matmul, TFLOP/s": 2 * n**3 / seconds / 1e12}
