"""The CUDA kernels under emulation with AddressSanitizer and UBSan, which cover what the emulation does not: register
arrays, shifts, signed overflow, and host code.
"""

import os
import subprocess
import sys

import pytest
from cuda_emulation import emulated
from sanitizers_for_tests import LIBRARIES, REPORTS

PROBLEMS = "head and 127 or extremes or broken and not 3000 or gumbel and (offset or classes)"
SELECTED = f"emulated and not float16 and ({PROBLEMS})"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in LIBRARIES, reason="g++ has no libasan.so or libubsan.so"),
]


def run_sanitized(command):
    environment = {
        **os.environ,
        emulated.SANITIZE: "1",
        "LD_PRELOAD": ":".join(map(str, LIBRARIES)),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.full
def test_no_report(monkeypatch):
    monkeypatch.setenv(emulated.SANITIZE, "1")  # compiled here, because the compiler must not run with these libraries
    emulated.compile_library(emulated.ROOT / "csrc", emulated.ROOT / "build" / "cuda_emulation_sanitized")
    options = ["-q", "-s", "-p", "no:cacheprovider", "-k", SELECTED]
    suite = emulated.ROOT / "tests" / "test_conformance.py"
    status, output = run_sanitized([sys.executable, "-m", "pytest", *options, suite])
    assert not any(report in output for report in REPORTS), output[-20000:]
    assert status == 0, output[-5000:]


FAULTY = """
#include "cuda/device.h"
using namespace dk;
struct Params { float* out; int index; };
static void kernel(Params p) {
  float x[4] = {1, 2, 3, 4};
  dev::syncthreads();
  dev::stg(p.out + dev::tid(), x[p.index]);
}
int main(int count, char**) {
  float out[32];
  emulation::allow(out, sizeof out);
  dev::launch<Params>("kernel", kernel, {1}, 32, 0, nullptr, {out, 2 + 2 * count});
}
"""


def test_an_array_overrun_is_reported(tmp_path):
    source = tmp_path / "kernel.cpp"
    source.write_text(FAULTY)
    include = [f"-I{emulated.ROOT / 'csrc'}", f"-I{emulated.HERE}"]
    flags = ["-std=c++17", "-g1", "-fsanitize=address,undefined", *include]
    subprocess.run(["g++", *flags, source, "-o", tmp_path / "kernel"], check=True)
    _, output = run_sanitized([tmp_path / "kernel"])
    assert "stack-buffer-overflow" in output or "index 4 out of bounds" in output
    assert "kernel.cpp:8" in output
