"""Stage suite: the test files of the kernels, if pytest is installed."""

import importlib.util
import os

from common.setting import ROOT, logged, python

# Patterns, so that new test files are included; tests of the model layer need more packages.
FILES = ("test_cuda_*.py", "test_triton_*.py", "test_sparse_attention.py", "test_decode_*.py",
         "test_gumbel_softmax.py", "test_sample_tokens.py", "test_philox.py", "test_plan.py", "test_patterns.py",
         "test_nn.py", "test_info.py", "test_backends.py", "test_compile.py")  # fmt: skip
PROCESSES = min(8, os.cpu_count() or 1)


def items(setting):
    return [("pytest", lambda: suite(setting))]


def suite(setting):
    if not all(map(importlib.util.find_spec, ("pytest", "hypothesis"))):
        raise ModuleNotFoundError("pytest or hypothesis is not installed; the checks of stage test ran without it")
    files = [str(file.relative_to(ROOT)) for pattern in FILES for file in sorted((ROOT / "tests").glob(pattern))]
    wanted = {
        "pytest_benchmark": ["--benchmark-disable"],
        "pytest_timeout": ["--timeout=120"],  # includes compilation by Triton
        "xdist": ["--numprocesses", str(PROCESSES), "--dist", "loadfile"],
    }
    options = [option for module, given in wanted.items() if importlib.util.find_spec(module) for option in given]
    options += ["-o", "addopts=", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    options += [] if setting.long else ["-m", "not slow"]
    command = python("-m", "pytest", "-q", "-rfE", "--tb=short", *options, *files)
    logged(command, env={**os.environ, "OMP_NUM_THREADS": "2"})
    return [{"files": files}]
