"""The comparison of a GPU's primitives with their emulation, without a GPU: the emulated half runs, the other half
compiles, and differences are reported.
"""

import shutil
import subprocess
import sys

import pytest
from cuda_emulation import primitives


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return primitives.expected(tmp_path_factory.mktemp("primitives"))


def changed(text, name, word, change):
    """`text` with one word changed in the tenth line of a primitive."""
    lines = text.splitlines()
    number = [i for i, line in enumerate(lines) if line.startswith(f"{name} ")][9]
    words = lines[number].split()
    words[4 + word] = f"{change(int(words[4 + word], 16)):08x}"
    lines[number] = " ".join(words)
    return "\n".join(lines)


def test_the_emulation_agrees_with_itself(expected):
    assert primitives.compare(expected, expected) == []


NAMES = [
    "ldg",
    "stg",
    "shared_memory",
    "cp_async",
    "shfl",
    "ballot",
    "ldmatrix_trans",
    "mma_float16",
    "pack_bfloat16",
    "unpack_float16",
    "arithmetic",
    "integer_arithmetic",
    "cluster",
]


@pytest.mark.parametrize("name", NAMES)
def test_one_wrong_bit_is_reported(expected, name):
    (problem,) = primitives.compare(changed(expected, name, 1, lambda word: word ^ 1), expected)
    assert problem.startswith(f"{name}: 1 of ") and "block 0, lane 9, word 1" in problem


def test_approximations_may_err_as_the_manual_says(expected):
    for name, allowed, wrong in (("exp2_approx", 2, 3), ("log2_approx", 1, 256)):
        assert primitives.compare(changed(expected, name, 0, lambda word, by=allowed: word + by), expected) == []
        assert primitives.compare(changed(expected, name, 0, lambda word, by=wrong: word + by), expected) != []


def test_missing_output_is_reported(expected):
    without = {
        name: "\n".join(line for line in expected.splitlines() if not line.startswith(name))
        for name in ("cluster", "ballot")
    }
    assert primitives.compare(without["cluster"], expected) == []  # older GPUs have no clusters
    assert primitives.compare(without["ballot"], expected) == ["ballot: nothing was printed"]


def test_swapped_fragment_registers_are_reported(expected, tmp_path):
    text = primitives.SOURCE.read_text()
    right = "DK_UNROLL_FOR (int i = 0; i < 4; ++i) l.put(i, c[i]);"
    assert text.count(right) == 1
    swapped = tmp_path / "primitives.cu"
    swapped.write_text(text.replace(right, right.replace("c[i]", "c[i ^ 3]")))
    problems = primitives.compare(primitives.expected(tmp_path, swapped), expected)
    assert {problem.split(":")[0] for problem in problems} == {"mma_bfloat16", "mma_float16"}


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_it_compiles_for_a_gpu(tmp_path, architecture):
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc")
    program = primitives.compile_for_gpu(tmp_path, architecture)
    if shutil.which("nvidia-smi") is None:  # without a driver the error is reported, not wrong numbers
        done = subprocess.run([program], capture_output=True, text=True)
        assert done.returncode == 1 and "CUDA" in done.stderr


def test_the_command_says_what_is_missing(tmp_path):
    command = [sys.executable, primitives.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode == 1 and "g++" in done.stderr
