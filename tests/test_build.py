"""The checks of setup.py: the torch that it finds, and one error sentence per missing tool. No compiler runs here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(tmp_path, **environment):
    """Runs `setup.py build_ext` into a temporary folder with a changed environment."""
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def fake_torch(folder, version, cuda="None"):
    folder.mkdir()
    (folder / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda}\n")
    return str(folder)


@pytest.fixture
def tools(tmp_path):
    """An empty folder for PATH, to which a test adds tools."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(*names):
        for name in names:
            (folder / name).write_text('#!/bin/sh\necho "$@"\n')
            (folder / name).chmod(0o755)
        return str(folder)

    return add


def test_an_old_torch_is_refused(tmp_path):
    result = build(tmp_path, DALLE_TORCH_DIR=fake_torch(tmp_path / "torch", "2.11.0"))
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith("dalle-kernels cannot be built: torch 2.11 in")
    assert 'pip install --upgrade "torch>=2.12"' in result.stderr


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ((), "cmake or ninja is missing; run: pip install cmake ninja"),
        (("cmake", "ninja"), "no C++ compiler was found"),
    ],
)
def test_missing_tools_are_named(tmp_path, tools, present, message):
    torch_dir = fake_torch(tmp_path / "torch", "2.13.0")
    result = build(tmp_path, DALLE_TORCH_DIR=torch_dir, PATH=tools(*present), CXX="no-such-compiler")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert message in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("value", "message"), [("yes", "DALLE_CUDA='yes' is not one of 0, 1, auto"), ("1", "nvcc is not on PATH")]
)
def test_cuda_requests_that_cannot_be_met(tmp_path, tools, value, message):
    torch_dir = fake_torch(tmp_path / "torch", "2.13.0")
    result = build(tmp_path, DALLE_TORCH_DIR=torch_dir, PATH=tools("cmake", "ninja", "c++"), DALLE_CUDA=value)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert message in result.stderr


@pytest.mark.parametrize(
    ("asked", "torch_cuda", "nvcc", "expected"),
    [
        ("auto", "'13.0'", True, "-DDALLE_CUDA=ON"),
        ("auto", "None", True, "-DDALLE_CUDA=OFF -DDALLE_CUDA_ABSENT=torch is a CPU build"),
        ("auto", "'13.0'", False, "-DDALLE_CUDA=OFF -DDALLE_CUDA_ABSENT=nvcc is not on PATH"),
        ("0", "'13.0'", True, "-DDALLE_CUDA=OFF -DDALLE_CUDA_ABSENT=DALLE_CUDA=0"),
        ("1", "None", True, "-DDALLE_CUDA=ON"),
    ],
)
def test_when_the_cuda_library_is_built(tmp_path, tools, asked, torch_cuda, nvcc, expected):
    torch_dir = fake_torch(tmp_path / "torch", "2.13.0", torch_cuda)
    path = tools("cmake", "ninja", "c++", *(["nvcc"] if nvcc else []))
    result = build(tmp_path, DALLE_TORCH_DIR=torch_dir, PATH=path, DALLE_CUDA=asked)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


@pytest.mark.parametrize(
    ("asked", "capabilities", "expected"),
    [
        ("90a;100", "8.0", "90a-real;100-real"),
        ("", "9.0\n9.0\n", "90a-real"),
        ("", "8.0\n8.6\n", "80-real;86-real"),
        ("", "NVIDIA-SMI has failed", "80-real;90a-real;100-real;90-virtual"),
    ],
)
def test_gpu_architectures(tmp_path, tools, asked, capabilities, expected):
    path = tools("cmake", "ninja", "c++", "nvcc", "nvidia-smi")
    Path(path, "nvidia-smi").write_text(f"#!/bin/sh\necho '{capabilities}'\n")
    torch_dir = fake_torch(tmp_path / "torch", "2.13.0")
    result = build(tmp_path, DALLE_TORCH_DIR=torch_dir, PATH=path, DALLE_CUDA="1", DALLE_CUDA_ARCHS=asked)
    assert f"-DCMAKE_CUDA_ARCHITECTURES={expected} " in result.stdout


def test_gpu_architectures_that_are_none(tmp_path, tools):
    torch_dir = fake_torch(tmp_path / "torch", "2.13.0")
    path = tools("cmake", "ninja", "c++", "nvcc")
    result = build(tmp_path, DALLE_TORCH_DIR=torch_dir, PATH=path, DALLE_CUDA="1", DALLE_CUDA_ARCHS="sm_80")
    assert result.returncode != 0
    assert "DALLE_CUDA_ARCHS='sm_80' is not of the form 80;90a" in result.stderr


def test_no_torch_at_all(tmp_path):
    """Without site-packages (-S) there is no torch; setuptools is added by path."""
    import setuptools

    site = tmp_path / "site"
    site.mkdir()
    for name in ("setuptools", "pkg_resources", "_distutils_hack"):
        source = Path(setuptools.__file__).parents[1] / name
        if source.exists():
            (site / name).symlink_to(source)
    code = (
        "import sys, sysconfig; sysconfig.get_path = lambda name: '/nonexistent';"
        f"sys.path.insert(0, {str(site)!r});"
        f"sys.argv = ['setup.py', '--quiet', 'build_ext', '--build-lib', {str(tmp_path)!r}];"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__name__': '__main__', '__file__': 'setup.py'})"
    )
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert 'torch is not installed; run: pip install "torch>=2.12"' in result.stderr
