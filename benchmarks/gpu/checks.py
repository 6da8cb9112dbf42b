"""Stage test: the conformance suite of the tests (tests/conformance), which needs no pytest, on the GPU."""

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
    """Runs a check on fresh random numbers; DALLE_TEST_SEED repeats a failure."""
    seed = int(os.environ.get("DALLE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    torch.manual_seed(seed)
    try:
        mostly(check)
    except Exception:
        print(f"DALLE_TEST_SEED={seed}")
        raise
    return [{"seed": seed}]
