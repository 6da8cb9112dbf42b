"""Stage test: the conformance suite (tests/conformance) on the GPU. It does not need pytest."""

from __future__ import annotations

import functools
import os
import random

import torch

from accuracy import mostly
from conformance import Target, cases


def items(setting):
    for backend in setting.backends():
        found = cases(Target(backend, setting.device))
        for case in found[::50] if setting.tiny else found:
            yield f"{backend}: {case.name}", functools.partial(seeded, case.check)


def seeded(check):
    """Runs a check with a new random seed; set DALLE_TEST_SEED to reproduce a failure."""
    seed = int(os.environ.get("DALLE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    torch.manual_seed(seed)
    try:
        mostly(check)
    except Exception:
        print(f"DALLE_TEST_SEED={seed}")
        raise
    return [{"seed": seed}]
