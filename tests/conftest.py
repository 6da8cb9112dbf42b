"""Shared fixtures. Every random test draws a fresh seed and shows it when it fails."""

import os
import random

import pytest
import torch

from accuracy import mostly


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Calls the test; anew, with the next random numbers, if a result is Inaccurate."""
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    mostly(lambda: pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def seed(record_property):
    """A fresh seed, torch's generator set to it; set DALLE_TEST_SEED to repeat a failure."""
    value = int(os.environ.get("DALLE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    torch.manual_seed(value)
    record_property("seed", value)
    print(f"DALLE_TEST_SEED={value}")
    return value
