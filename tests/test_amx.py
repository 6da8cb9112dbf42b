"""The `amx` kernels on any machine: their machine code runs on the processor's tiles where it has some, else under
emulation (amx_emulation/emulation.cpp). First the emulation itself, then the kernels.
"""

import os
import signal
import subprocess

import pytest
from amx_emulation import amx

pytestmark = pytest.mark.skipif(amx.problem() is not None, reason=str(amx.problem()))
emulated = pytest.mark.skipif(amx.problem() is None and amx.native(), reason="this processor has AMX")


def exercise(name, seed):
    program = amx.compile("exercise.cpp", "-O1", "-mamx-tile", "-mamx-bf16", "-pthread")
    command = [program, name, str(seed)]
    return subprocess.run(command, env={**os.environ, **amx.environment()}, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["products", "addresses", "rounding", "threads"])
def test_instructions(name, seed):
    done = exercise(name, seed)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr
    assert amx.native() or "instructions" in done.stderr


@emulated
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no permission", "the process did not ask for permission to use tiles"),
        ("unconfigured", "no tiles are configured"),
        ("released", "no tiles are configured"),
        ("another tile", "this tile is not configured"),
        ("too many rows", "a tile of more than 16 rows or 64 bytes a row"),
        ("rows too long", "a tile of more than 16 rows or 64 bytes a row"),
        ("rows without columns", "a tile with rows or columns alone"),
        ("palette 2", "no such palette"),
        ("reserved", "reserved bytes are set"),
        ("wrong shape", "the tiles' shapes do not match"),
        ("same tile", "its three tiles are not different"),
    ],
)
def test_what_a_processor_refuses_is_reported(name, message, seed):
    done = exercise(name, seed)
    assert done.returncode == -signal.SIGABRT, (done.returncode, done.stderr)
    assert message in done.stderr and "exercise-" in done.stderr


@emulated
def test_tiles_that_are_not_released_are_reported(seed):
    done = exercise("held", seed)
    assert done.returncode == 1 and "1 threads did not release their tiles" in done.stderr


@emulated
@pytest.mark.parametrize(("name", "number"), [("no address", signal.SIGSEGV), ("not AMX", signal.SIGILL)])
def test_other_faults_stay_what_they_are(name, number, seed):
    assert exercise(name, seed).returncode == -number
