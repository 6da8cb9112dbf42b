"""`python -m dalle_kernels.info` and the import of the package, with and without its compiled libraries."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dalle_kernels
from dalle_kernels import _host, build_info

PACKAGE = Path(dalle_kernels.__file__).parent


def python(*arguments, folder=PACKAGE.parent, **environment):
    """Runs a new interpreter in `folder`, from which it imports dalle_kernels; returns its result with text output."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env={**os.environ, **environment}
    )


def info(folder=PACKAGE.parent, **environment):
    result = python("-m", "dalle_kernels.info", "--json", folder=folder, **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_reports_every_operation_and_why_others_are_refused():
    report = info()
    assert set(report["operations"]) == {"sparse_attention", "gumbel_softmax", "sample_tokens", "decode_attention"}
    for devices in report["operations"].values():
        assert devices["cpu"]["backend"] == "cpu"
        assert "cuda" in devices["cpu"]["refused"]
    assert report["build"]["cpu_isa_active"] in report["build"]["cpu_isas_here"] and report["build"]["cpu_isa_reason"]


def test_reports_what_cuda_was_built_for_or_why_it_was_not():
    cuda = info()["build"]["cuda"]
    assert set(cuda) in ({"compiler", "architectures"}, {"not_built"}) and all(cuda.values())


def test_text_names_the_same_things():
    text = python("-m", "dalle_kernels.info").stdout
    for word in ("sparse_attention", "cpu_isa_active", "libdalle_cuda.so", "torch"):
        assert word in text


@pytest.fixture
def copied_package(tmp_path):
    """The folder of a copy of the package, whose libraries a test may break."""
    shutil.copytree(PACKAGE, tmp_path / "dalle_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_without_a_usable_library_everything_runs_on_the_reference(copied_package, damage):
    library = copied_package / "dalle_kernels" / "libdalle_cpu.so"
    if damage == "missing":
        library.unlink()
    else:
        library.write_bytes(b"not a library")
    report = info(copied_package)
    assert "libdalle_cpu.so" in report["build"]["problem"]
    for devices in report["operations"].values():
        assert devices["cpu"]["backend"] == "reference"
        assert "libdalle_cpu.so" in devices["cpu"]["refused"]["cpu"]
    code = "import torch, dalle_kernels as dk; print(dk.gumbel_softmax(torch.zeros(1, 4), seed=1).sum().item())"
    assert float(python("-c", code, folder=copied_package).stdout) == pytest.approx(1)


def test_the_module_of_the_tests_is_not_needed(copied_package):
    [library] = (copied_package / "dalle_kernels").glob("_host*")
    library.unlink()
    report = info(copied_package)
    assert report["build"]["version"] == report["dalle_kernels"] == dalle_kernels.__version__
    assert report["libraries"]["cpu"] == "loaded"


def test_a_wrong_instruction_set_concerns_the_cpu_backend_only():
    libraries = info(DALLE_KERNELS_CPU_ISA="mmx")["libraries"]
    assert "mmx" in libraries["cpu"] and "mmx" not in libraries["cuda"]


def test_forced_instruction_sets_are_used_or_refused():
    for isa, supported in build_info.cpu_isas().items():
        report = info(DALLE_KERNELS_CPU_ISA=isa)
        backend = report["operations"]["sparse_attention"]["cpu"]["backend"]
        if supported:
            assert report["build"]["cpu_isa_active"] == isa and backend == "cpu"
        else:
            assert backend == "reference"
    refused = info(DALLE_KERNELS_CPU_ISA="mmx")["operations"]["sparse_attention"]["cpu"]["refused"]["cpu"]
    assert "DALLE_KERNELS_CPU_ISA='mmx' is not one of the compiled portable" in refused


@pytest.mark.parametrize(
    ("supported", "vendor", "request_", "isa", "reason"),
    [
        (1, "GenuineIntel", "", "portable", "the only one"),
        (2, "AuthenticAMD", "", "avx2", "the best"),
        (3, "GenuineIntel", "", "avx512", "the best"),
        (4, "GenuineIntel", "", "avx512", "faster than avx512_bf16 here: Intel's bfloat16 dot product"),
        (4, "AuthenticAMD", "", "avx512_bf16", "the best"),
        (4, "", "", "avx512_bf16", "the best"),
        (5, "GenuineIntel", "", "amx", "the best"),
        (4, "GenuineIntel", "avx512_bf16", "avx512_bf16", "DALLE_KERNELS_CPU_ISA"),
        (5, "GenuineIntel", "portable", "portable", "DALLE_KERNELS_CPU_ISA"),
        (2, "GenuineIntel", "amx", "avx2", "the best"),
    ],
)
def test_the_instruction_set_is_chosen_by_what_it_is_worth(supported, vendor, request_, isa, reason):
    isas = [_host.Isa.portable, _host.Isa.avx2, _host.Isa.avx512, _host.Isa.avx512_bf16, _host.Isa.amx]
    chosen, why = _host.choose_isa(isas[:supported], vendor, request_)
    assert chosen == isa and reason in why


def test_the_environment_forces_a_backend():
    code = (
        "import torch, dalle_kernels as dk; q = torch.zeros(1, 1, 2, 8);"
        "dk.sparse_attention(q, q, q, dk.AttentionPattern.row(1, (1, 1)))"
    )
    assert python("-c", code, DALLE_KERNELS_BACKEND="reference").returncode == 0
    wrong = python("-c", code, DALLE_KERNELS_BACKEND="tpu")
    assert wrong.returncode != 0 and "backend='tpu' is not one of" in wrong.stderr


def test_info_shows_what_is_forced():
    for devices in info(DALLE_KERNELS_BACKEND="reference")["operations"].values():
        assert devices["cpu"]["backend"] == "reference"
        assert "reference is forced" in devices["cpu"]["refused"]["cpu"]
