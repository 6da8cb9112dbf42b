"""The time of `import dalle_kernels` beyond `import torch`."""

import subprocess
import sys

import pytest
from common.timing import quartiles
from comparison import ROUNDS

CODE = """
import time
begin = time.perf_counter()
import torch
middle = time.perf_counter()
import {package}
print(time.perf_counter() - middle, middle - begin)
"""


def import_times(package):
    """Seconds for `package` after torch, and for torch, in a new process."""
    command = [sys.executable, "-c", CODE.format(package=package)]
    return [float(x) for x in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


@pytest.mark.parametrize("package", ["dalle_kernels"])
def test_import(record, package):
    """The package after torch, and torch; every round in a new process, with files in the page cache."""
    import_times(package)
    ours, torch = zip(*(import_times(package) for _ in range(ROUNDS)))
    seconds = {"ours": quartiles(ours), "torch": quartiles(torch)}
    record({}, seconds, {"torch": quartiles(b / a for a, b in zip(ours, torch))}, unit="ms")
