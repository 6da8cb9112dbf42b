"""Calls in new processes, forked from a server that has imported PyTorch and Triton."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver

import pytest

PRELOADED = ["cuda_emulation.plants", "triton_ahead.compile_ahead"]  # slow to import


def server():
    """The multiprocessing context of the server, which runs."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # servers ignore the parent's path, and what they miss
        patch.delenv("TRITON_INTERPRET", raising=False)
        forkserver.ensure_running()
    return processes


def call(function, *arguments):
    """The result of a module-level function, called in a new process."""
    with ProcessPoolExecutor(1, mp_context=server()) as process:
        return process.submit(function, *arguments).result()
