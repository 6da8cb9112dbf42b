"""The CUDA emulation (tests/cuda_emulation) detects faults: kernels that violate one rule each, and faults injected
into the real kernels.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_emulation import emulated, plants
from processes_for_tests import call

HERE = Path(emulated.__file__).parent
CSRC = emulated.ROOT / "csrc"


@pytest.fixture(scope="module")
def faulty_kernels(tmp_path_factory):
    """reports(kernel, seed): the emulation's reports on a kernel of faulty_kernels.cu."""
    program = tmp_path_factory.mktemp("faulty") / "faulty"
    source = HERE / "faulty_kernels.cu"
    flags = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{HERE}"]
    subprocess.run(["g++", *flags, "-x", "c++", source, "-o", program], check=True)

    def reports(*arguments):
        done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return reports


FAULTS = {
    "beyond shared memory": "shared memory out of bounds",
    "before shared memory": "shared memory out of bounds",
    "half beyond shared memory": "shared memory out of bounds",
    "misaligned in shared memory": "misaligned shared access",
    "beyond global memory": "global memory out of bounds",
    "write before global memory": "global memory out of bounds",
    "copy from beyond global memory": "global memory out of bounds",
    "misaligned in global memory": "misaligned global access",
    "uninitialised": "read of uninitialised shared memory",
    "read after write": "read after write without a barrier",
    "read after write in a warp": "read after write without a barrier",
    "ldmatrix after write": "read after write without a barrier",
    "a shuffle is no barrier": "read after write without a barrier",
    "a warp's barrier is not a block's": "read after write without a barrier",
    "write after read": "write after read without a barrier",
    "write after write": "write after write without a barrier",
    "no wait": "read of shared memory with a cp.async in flight",
    "short wait": "read of shared memory with a cp.async in flight",
    "write over a copy": "write over a cp.async in flight",
    "wait without barrier": "read after write without a barrier",
    "never waited for": "kernel ends with a cp.async never waited for",
    "never committed": "kernel ends with a cp.async never committed",
    "divergent": "divergent collective",
    "half a warp": "deadlock: 32 threads at syncwarp",
    "half a block": "deadlock: 32 threads at syncthreads",
    "early return": "deadlock: 63 threads at syncthreads",
    "other block without barrier": "read of another block's memory without a cluster barrier",
    "uninitialised in another block": "read of uninitialised shared memory of another block",
    "no such block": "no such block in the cluster",
    "write after another block's read": "without a cluster barrier",
    "no barrier before the end": "shared memory",
}
RIGHT = ["right: barriers", "right: in a warp", "right: copies", "right: cluster"]


def test_every_faulty_kernel_is_tested(faulty_kernels):
    assert set(faulty_kernels()) == {*FAULTS, *RIGHT}


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_broken_rule_is_reported_whatever_the_order(faulty_kernels, kernel):
    source = (HERE / "faulty_kernels.cu").read_text().splitlines()
    first = next(i for i, line in enumerate(source) if f'"{kernel}"' in line) + 1
    lines = range(first, first + 8) if kernel != "never waited for" else range(len(source))
    for seed in range(8):
        reports = [report.split(":", 2) for report in faulty_kernels(kernel, seed)]
        assert any(int(line) in lines and FAULTS[kernel] in what for _, line, what in reports), (seed, reports)


@pytest.mark.parametrize("kernel", RIGHT)
def test_nothing_is_reported_of_a_right_kernel(faulty_kernels, kernel):
    for seed in range(8):
        assert faulty_kernels(kernel, seed) == []


def test_unwritten_elements_are_counted():
    result = torch.full((3, 4), -1, dtype=torch.int32).view(torch.float32)  # as filled by new_output
    result[1, 2:] = 0.0
    assert emulated._unwritten(result) == 10
    assert emulated._unwritten(torch.full((2, 3), torch.nan)) == 0  # a written NaN has other bits


# -- injected faults


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """run(plant or None, operation): the report of the operation's case, run from sources with that fault."""
    folder = tmp_path_factory.mktemp("planted")
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)

    def run(plant, operation):
        source = copy / plant.file if plant else None
        text = source.read_text() if plant else None
        if plant:
            assert text.count(plant.old) == 1, f"{plant.file} has {text.count(plant.old)} times: {plant.old}"
            source.write_text(text.replace(plant.old, plant.new))
        try:
            return call(plants.report, operation, copy, folder / "objects")
        finally:
            if plant:
                source.write_text(text)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("operation", plants.CASES)
def test_the_case_passes_without_a_fault(planted, operation):
    assert planted(None, operation) == ""


@pytest.mark.slow
@pytest.mark.parametrize("plant", plants.PLANTS, ids=lambda plant: f"{plant.operation}: {plant.name}")
def test_a_planted_fault_is_caught(planted, plant):
    said = planted(plant, plant.operation)
    assert plant.caught in said, said or "nothing was found"
