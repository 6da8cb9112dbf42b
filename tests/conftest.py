"""The random numbers of tests: the same in every run, or new ones with `make fuzz`."""

import os
import random
import zlib

import hypothesis
import pytest
import torch

import accuracy


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=0, metavar="N", help="run accuracy tests N times; see `make fuzz`")


def pytest_configure(config):
    if config.option.fuzz:
        accuracy.ratios = []
    chance = {"derandomize": not config.option.fuzz, "database": None, "deadline": None}
    hypothesis.settings.register_profile("dalle", max_examples=40, **chance)
    hypothesis.settings.register_profile("brief", max_examples=8, **chance)  # for sanitizers and simulated kernels
    hypothesis.settings.load_profile("dalle")  # --hypothesis-profile comes after it


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs the test, and repeats it with the next random numbers if a result is Inaccurate. With --fuzz, runs it N
    times if it has accuracy checks.
    """
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    if accuracy.ratios is None:
        accuracy.mostly(lambda: pyfuncitem.obj(**arguments))
        return True
    accuracy.ratios.clear()
    for _ in range(pyfuncitem.config.option.fuzz):
        pyfuncitem.obj(**arguments)
        if not accuracy.ratios:
            break
    pyfuncitem.user_properties += [("error ratio", entry) for entry in accuracy.ratios]
    return True


def pytest_terminal_summary(terminalreporter):
    calls = [r for reports in terminalreporter.stats.values() for r in reports if getattr(r, "when", None) == "call"]
    found = [value for report in calls for name, value in report.user_properties if name == "error ratio"]
    if found:
        terminalreporter.section("accuracy")
        terminalreporter.write_line(accuracy.distribution(found))


@pytest.fixture(autouse=True)
def seed(request):
    """Seeds torch's generator for the test: with a hash of the test's id, so that every run uses the same numbers, or
    with a new seed with --fuzz. DALLE_TEST_SEED overrides it, to reproduce a failure.
    """
    fixed = zlib.crc32(request.node.nodeid.encode()) >> 1
    fresh = random.SystemRandom().randrange(2**31) if request.config.option.fuzz else fixed
    value = int(os.environ.get("DALLE_TEST_SEED") or fresh)
    torch.manual_seed(value)
    print(f"DALLE_TEST_SEED={value}")
    return value
