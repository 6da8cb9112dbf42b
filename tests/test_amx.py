"""The `amx` kernels on any machine: their machine code runs on the processor's tiles where it has some, else under
emulation (amx_emulation/emulation.cpp). First the emulation itself, then the kernels.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from amx_emulation import amx

from dalle_kernels import build_info

PROBLEM = amx.problem() or ("amx" not in build_info.cpu_isas() and "the compiler does not know AMX") or None
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
emulated = pytest.mark.skipif(PROBLEM is None and amx.native(), reason="this processor has AMX")


TILES = "-mamx-tile", "-mamx-bf16"


def run(*command, **environment):
    environment = {**os.environ, **amx.environment(), **environment}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


def exercise(name, seed):
    return run(amx.compile("exercise.cpp", "-O1", *TILES, "-pthread"), name, seed)


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


# -- csrc/cpu/matrix.h

needs_avx512_bf16 = pytest.mark.skipif(
    PROBLEM is None and "avx512_bf16" not in amx.processor(), reason="the kernels need AVX512-BF16 too"
)
AVX512 = "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c"
QUIET = "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"


def primitive(isa, seed, csrc=amx.CSRC):
    flags = [*AVX512, *(TILES if isa == "amx" else ()), f"-DDK_ISA={isa}", "-O2", "-ffp-contract=fast", *QUIET]
    return run(amx.compile("primitive.cpp", *flags, csrc=csrc), seed)


@needs_avx512_bf16
@pytest.mark.parametrize("isa", ["avx512_bf16", "amx"])
def test_the_primitive(isa, seed):
    done = primitive(isa, seed)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


PLANTS = {
    "no release": ("_tile_release();", "", "did not release their tiles"),
    "no configuration": ("_tile_loadconfig(&config);", "(void)config;", "no tiles are configured"),
    "fewer rows": ("{16, 16, 16, 16, 16, 16, 16, 16}", "{16, 16, 16, 16, 16, 16, 16, 8}", "shapes do not match"),
    "shorter rows": ("{64, 64, 64, 64, 64, 64, 64, 64}", "{64, 64, 64, 64, 64, 64, 64, 32}", "shapes do not match"),
    "wrong tile": ("_tile_dpbf16ps(3, 5, 7)", "_tile_dpbf16ps(3, 4, 7)", "wrong product"),
    "wrong stride": ("_tile_loadd(6, right, ldb * 4)", "_tile_loadd(6, right, ldb * 2)", "wrong product"),
}


@emulated
@needs_avx512_bf16
@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_noticed(plant, tmp_path, seed):
    before, after, message = PLANTS[plant]
    csrc = tmp_path / "csrc"
    shutil.copytree(amx.CSRC / "cpu", csrc / "cpu")
    text = (csrc / "cpu" / "matrix.h").read_text()
    assert before in text
    (csrc / "cpu" / "matrix.h").write_text(text.replace(before, after))
    done = primitive("amx", seed, csrc)
    assert done.returncode != 0 and message in done.stdout + done.stderr


# -- attention


@needs_avx512_bf16
@pytest.mark.slow
def test_attention():
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    file = Path(__file__).with_name("test_sparse_attention.py")
    selected = "(bfloat16 or any_shape) and not reference"
    done = run(*pytest_here, file, "-k", selected, DALLE_KERNELS_CPU_ISA="amx")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
    if not amx.native():
        assert int(re.search(r"AMX emulation: (\d+) instructions", done.stderr)[1]) > 100_000
