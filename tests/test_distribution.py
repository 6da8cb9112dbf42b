"""The sdist, the wheel built from it, and programs that run from the wheel."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from builds_for_tests import once

import dalle_kernels

ROOT = Path(__file__).parents[1]
VERSION = dalle_kernels.__version__
NOT_SOURCES = [".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split())]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command, **options):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # cmake and ninja
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "PATH": path, "DALLE_CUDA": "0"},
        **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources without build products."""

    def copy(folder):
        shutil.copytree(ROOT, folder / "dalle-kernels", ignore=shutil.ignore_patterns(*NOT_SOURCES))

    return once(tmp_path_factory, "source", copy) / "dalle-kernels"


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    def build(folder):
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, source)

    [archive] = once(tmp_path_factory, "sdist", build).iterdir()
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    """The unpacked sdist."""
    folder = once(tmp_path_factory, "unpacked", lambda folder: shutil.unpack_archive(sdist, folder))
    return folder / f"dalle_kernels-{VERSION}"


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """The wheel that pip builds from it."""

    def build(folder):
        command = sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder
        run(*command, unpacked)

    [archive] = once(tmp_path_factory, "wheel", build).iterdir()
    return archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin folder of a virtual environment with the wheel, which uses the dependencies of this environment."""

    def install(folder):
        venv.create(folder, symlinks=True)
        run(sys.executable, "-m", "pip", "--python", folder, "install", "--no-index", "--no-deps", wheel)
        [site] = folder.glob("lib/python*/site-packages")
        outer = [path for path in sys.path if path.endswith("site-packages")]
        (site / "outer.pth").write_text("\n".join(outer))

    return once(tmp_path_factory, "venv", install) / "bin"


def test_the_sdist_has_all_that_a_build_needs(source, sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    folders = [path for name in ("csrc", "dalle", "dalle_kernels") for path in (source / name).rglob("*")]
    needed = {str(path.relative_to(source)) for path in folders if path.is_file()}
    needed |= {"CMakeLists.txt", "CHANGELOG.md", "LICENSE", "README.md", "constraints.txt"}
    needed |= {"build_backend.py", "pyproject.toml", "setup.py"}
    assert needed - names == set()
    assert not [name for name in names if name.startswith("tests/") or name.endswith((".so", ".pyc"))]


def test_building_an_sdist_does_not_require_torch():
    code = "import build_backend; print(build_backend.get_requires_for_build_sdist())"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


def test_one_wheel_serves_every_python(wheel):
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version, python, abi) == ("dalle_kernels", VERSION, "py3", "none") and platform.startswith("linux_")
    names = set(zipfile.ZipFile(wheel).namelist())
    libraries = {name for name in names if name.endswith(".so")} - {"dalle_kernels/libdalle_cuda.so"}
    assert libraries == {"dalle_kernels/libdalle_cpu.so"}
    assert {"dalle/py.typed", "dalle_kernels/py.typed", "dalle/shipped/prior.safetensors"} <= names


def test_building_leaves_nothing_in_the_source_folder(source, unpacked, wheel):
    """Building the sdist and the wheel leaves no files."""
    left = [path for folder in (source, unpacked) for path in folder.iterdir()]
    assert [path.name for path in left if path.name == "build" or path.suffix == ".egg-info"] == []


def test_the_wheel_generates(installed, tmp_path):
    where = run(installed / "python", "-c", "import dalle_kernels; print(dalle_kernels.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    run(installed / "dalle", "generate", "red heart", "--candidates", 1, "--out", "heart.png", cwd=tmp_path)
    assert (tmp_path / "heart.png").stat().st_size > 0


def test_info_from_the_wheel(installed, tmp_path):
    said = run(installed / "python", "-m", "dalle_kernels.info", cwd=tmp_path)
    assert f"dalle_kernels: {VERSION}" in said and "cpu: loaded" in said
