"""The machine code of the `amx` kernels, natively on processors with AMX, and under emulation on any processor
(amx_emulation/emulation.cpp). Both must agree bit by bit. First the emulation itself, then the kernels.
"""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from amx_emulation import amx

TESTS = Path(__file__).parent


def needs(*modes, kernels=False):
    """Skips the test unless AMX code can run in all these modes."""
    problems = [amx.problem(mode, kernels) for mode in modes]
    return pytest.mark.skipif(any(problems), reason=next(filter(None, problems), ""))


def in_each_mode(kernels=False):
    modes = [pytest.param(mode, marks=needs(mode, kernels=kernels)) for mode in ("native", "emulated")]
    return pytest.mark.parametrize("mode", modes)


# -- instructions

TILES = "-mamx-tile", "-mamx-bf16"


def exercise():
    return amx.compile("exercise.cpp", "-O1", *TILES, "-mfma", "-pthread")


def run_exercise(mode, name, seed):
    return amx.run(mode, amx.prepared(exercise(), mode), name, seed)


def emulated_instructions(done):
    """The number of instructions that were emulated for a process."""
    found = re.search(r"AMX emulation: (\d+) instructions", done.stderr)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("name", ["products", "addresses", "rounding", "sums", "accepted", "threads"])
@in_each_mode()
def test_instructions(mode, name, seed):
    done = run_exercise(mode, name, seed)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr
    assert (emulated_instructions(done) > 0) == (mode == "emulated")


@needs("native", "emulated")
def test_the_emulation_rounds_as_the_processor(seed):
    native, emulated = (run_exercise(mode, "results", seed) for mode in ("native", "emulated"))
    assert native.returncode == emulated.returncode == 0
    assert native.stdout and native.stdout == emulated.stdout


@pytest.mark.parametrize(
    ("name", "message", "number"),
    [
        ("no permission", "the process did not ask for permission to use tiles", signal.SIGILL),
        ("unconfigured", "no tiles are configured", signal.SIGILL),
        ("released", "no tiles are configured", signal.SIGILL),
        ("another tile", "this tile is not configured", signal.SIGILL),
        ("too many rows", "a tile of more than 16 rows or 64 bytes a row", signal.SIGSEGV),
        ("rows too long", "a tile of more than 16 rows or 64 bytes a row", signal.SIGSEGV),
        ("rows without columns", "a tile with rows or columns alone", signal.SIGSEGV),
        ("palette 2", "no such palette", signal.SIGSEGV),
        ("reserved", "reserved bytes are set", signal.SIGSEGV),
        ("part of a word", "rows are not whole words (instruction 4b", signal.SIGILL),
        ("part of a word stored", "rows are not whole words (instruction 4b", signal.SIGILL),
        ("wrong shape", "the tiles' shapes do not match", signal.SIGILL),
        ("same tile", "its three tiles are not different", signal.SIGILL),
    ],
)
@in_each_mode()
def test_what_a_processor_refuses_is_reported(mode, name, message, number, seed):
    done = run_exercise(mode, name, seed)
    if mode == "native":
        assert done.returncode == -number, (done.returncode, done.stderr)
    else:
        assert done.returncode == -signal.SIGABRT, (done.returncode, done.stderr)
        assert message in done.stderr and "exercise-" in done.stderr


@needs("emulated")
def test_tiles_that_are_not_released_are_reported(seed):
    done = run_exercise("emulated", "held", seed)
    assert done.returncode == 1 and "1 threads did not release their tiles" in done.stderr


@pytest.mark.parametrize(("name", "number"), [("no address", signal.SIGSEGV), ("not AMX", signal.SIGILL)])
@in_each_mode()
def test_other_faults_stay_what_they_are(mode, name, number, seed):
    assert run_exercise(mode, name, seed).returncode == -number


# -- hiding instructions


@needs("emulated")
def test_hidden_instructions_run_nowhere_but_under_emulation(seed):
    hidden = amx.prepared(exercise(), "emulated")
    assert amx.run("native", hidden, "products", seed).returncode == -signal.SIGILL
    assert amx.run("emulated", hidden, "products", seed).returncode == 0


@needs("emulated")
@pytest.mark.skipif(amx.problem("native") is None, reason="this processor has AMX: what is not hidden is not emulated")
def test_hiding_changes_no_result(seed):
    hidden = run_exercise("emulated", "results", seed)
    plain = amx.run("native", exercise(), "results", seed, LD_PRELOAD=str(amx.emulation(amx.VEX)))
    assert hidden.returncode == plain.returncode == 0
    assert hidden.stdout and hidden.stdout == plain.stdout
    assert emulated_instructions(hidden) == emulated_instructions(plain) > 0


# -- csrc/cpu/matrix.h

AVX512 = "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c"
QUIET = "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"


def run_primitive(isa, mode, seed, csrc=amx.CSRC):
    flags = [*AVX512, *(TILES if isa == "amx" else ()), f"-DDK_ISA={isa}", "-O2", "-ffp-contract=fast", *QUIET]
    return amx.run(mode, amx.prepared(amx.compile("primitive.cpp", *flags, csrc=csrc), mode), seed)


@in_each_mode(kernels=True)
def test_the_primitive(mode, seed):
    done = run_primitive("amx", mode, seed)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


@pytest.mark.skipif(not amx.ISAS.get("avx512_bf16"), reason="this processor has no AVX512-BF16")
def test_the_primitive_without_tiles(seed):
    done = run_primitive("avx512_bf16", "native", seed)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


PLANTS = {
    "no release": ("_tile_release();", "", "did not release their tiles"),
    "no configuration": ("_tile_loadconfig(&config);", "(void)config;", "no tiles are configured"),
    "fewer rows": ("{16, 16, 16, 16, 16, 16, 16, 16}", "{16, 16, 16, 16, 16, 16, 16, 8}", "shapes do not match"),
    "shorter rows": ("{64, 64, 64, 64, 64, 64, 64, 64}", "{64, 64, 64, 64, 64, 64, 64, 32}", "shapes do not match"),
    "wrong tile": ("_tile_dpbf16ps(3, 5, 7)", "_tile_dpbf16ps(3, 4, 7)", "wrong product"),
    "wrong stride": ("_tile_loadd(6, right, ldb * 4)", "_tile_loadd(6, right, ldb * 2)", "wrong product"),
}


@needs("emulated", kernels=True)
@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_noticed(plant, tmp_path, seed):
    before, after, message = PLANTS[plant]
    csrc = tmp_path / "csrc"
    shutil.copytree(amx.CSRC / "cpu", csrc / "cpu")
    text = (csrc / "cpu" / "matrix.h").read_text()
    assert before in text
    (csrc / "cpu" / "matrix.h").write_text(text.replace(before, after))
    done = run_primitive("amx", "emulated", seed, csrc)
    assert done.returncode != 0 and message in done.stdout + done.stderr


# -- attention


def run_python(mode, folder, *arguments, isa="amx"):
    """Runs Python with the package in `folder`, its working directory and therefore first on its path."""
    path = os.pathsep.join([str(amx.package(folder, mode)), str(TESTS)])
    return amx.run(mode, sys.executable, *arguments, cwd=folder, PYTHONPATH=path, DALLE_KERNELS_CPU_ISA=isa)


def attention(mode, folder):
    """The results that amx_emulation/attention.py saves."""
    folder.mkdir()
    done = run_python(mode, folder, TESTS / "amx_emulation" / "attention.py", folder / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (emulated_instructions(done) > 10_000) == (mode == "emulated")
    return torch.load(folder / "results")


@needs("native", "emulated", kernels=True)
def test_attention_is_emulated_bit_by_bit(tmp_path):
    native, emulated = (attention(mode, tmp_path / mode) for mode in ("native", "emulated"))
    assert native.keys() == emulated.keys()
    bits = torch.uint8
    different = [name for name, x in native.items() if not torch.equal(x.view(bits), emulated[name].view(bits))]
    assert not different


@in_each_mode(kernels=True)
@pytest.mark.slow
def test_attention(mode, tmp_path):
    pytest_here = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    selected = "(bfloat16 or any_shape) and not reference"
    done = run_python(mode, tmp_path, *pytest_here, TESTS / "test_sparse_attention.py", "-k", selected)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
    assert (emulated_instructions(done) > 100_000) == (mode == "emulated")
