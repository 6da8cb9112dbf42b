"""Compares the primitives of csrc/cuda/device.h on this machine's GPU with their emulation, bit by bit; see
primitives.cu. Needs nvcc, g++ and numpy.

python tests/cuda_emulation/primitives.py [FOLDER]      what is built stays in FOLDER (default: build/primitives)
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = HERE / "primitives.cu"
OPTIONAL = {"cluster"}  # not printed by GPUs before sm_90, which lack them


def expected(folder: Path, source: Path = SOURCE) -> str:
    """The output of the program under emulation."""
    program = folder / "primitives-emulated"
    flags = ["-O1", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    return _run([_build(["g++", *flags, "-x", "c++"], source, program)])


def compile_for_gpu(folder: Path, architecture: str) -> Path:
    """Builds the program for a GPU. `architecture`: 90a or similar, or native."""
    target = ["-arch=native"]
    if architecture != "native":
        target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    return _build(["nvcc", "-O3", *target], SOURCE, folder / f"primitives-{architecture}")


def _build(compiler, source, program):
    program.parent.mkdir(parents=True, exist_ok=True)
    _run([*compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", f"-I{HERE}", str(source), "-o", str(program)])
    return program


def _run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr}")
    return done.stdout


def _parse(text):
    """{primitive: (how to compare, places [n, 2] as block and lane, words [n, words])}"""
    lines: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        name, *rest = line.split()
        lines.setdefault(name, []).append(rest)
    return {
        name: (
            rows[0][0],
            np.array([[int(place) for place in row[1:3]] for row in rows]),
            np.array([[int(word, 16) for word in row[3:]] for row in rows], dtype=np.uint32),
        )
        for name, rows in lines.items()
    }


def compare(got: str, expected: str) -> list[str]:
    """The differences, one line per primitive; empty if the GPU's output is as expected."""
    got, expected = _parse(got), _parse(expected)
    problems = [f"{name}: nothing was printed" for name in expected.keys() - got.keys() - OPTIONAL]
    for name, (how, places, words) in expected.items():
        if name not in got:
            continue
        _, their_places, their_words = got[name]
        if their_words.shape != words.shape or (their_places != places).any():
            problems.append(f"{name}: {their_words.shape} words where {words.shape} were expected")
            continue
        wrong = ~_equal(how, their_words, words)
        if wrong.any():
            row, word = np.argwhere(wrong)[0]
            block, lane = places[row]
            problems.append(
                f"{name}: {wrong.sum()} of {wrong.size} words differ; first in block {block}, lane {lane}, "
                f"word {word}: {their_words[row, word]:08x} where {words[row, word]:08x} was expected"
            )
    return problems


def _equal(how, got, expected):
    if how == "bits":
        return got == expected
    with np.errstate(invalid="ignore"):
        a, b = (words.view(np.float32).astype(np.float64) for words in (got, expected))
        error, ulp = np.abs(a - b), np.spacing(np.abs(expected.view(np.float32))).astype(np.float64)
    same = (got == expected) | (np.isnan(a) & np.isnan(b))
    if how == "float":
        return same
    # The PTX manual's bounds, and where the emulation itself rounds: exp2 2 ulp, and denormal results may be 0; log2 an
    # absolute error of 2^-22 between 0.5 and 2, a relative one elsewhere.
    bound = {"exp2": np.maximum(2 * ulp, 2.0**-126), "log2": 2.0**-22 * np.maximum(np.abs(b), 1) + ulp}[how]
    return same | (error <= bound)


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "primitives"
    wanted = expected(folder)
    problems = compare(_run([compile_for_gpu(folder, "native")]), wanted)
    print("\n".join(problems) or f"{len(_parse(wanted))} groups of primitives agree with their emulation, bit by bit")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
