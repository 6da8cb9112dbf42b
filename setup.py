"""Builds the compiled part with CMake and Ninja; see CMakeLists.txt and csrc/README.md.

Environment: MAX_JOBS (parallel compile jobs), DALLE_CUDA=0|1 (leave out | force the CUDA library; default: when nvcc
and a CUDA build of torch are found), DALLE_CUDA_ARCHS (for instance 80;90a; default: those of the GPUs in this machine,
or, where there are none, 80;90a;100 and PTX for later ones), DALLE_TORCH_DIR (the folder of the torch package to
compile against).
"""

import atexit
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MINIMUM_TORCH = (2, 12)
TORCH = "torch>=2.12"
# PTX of 90, for newer GPUs: code for 80 knows no clusters, which are launched from 90 on.
CUDA_ARCHS = ["80-real", "90a-real", "100-real", "90-virtual"]


def find_torch():
    """The folder of the torch package, without importing it: pip's isolated build sees the outer environment's by
    path only.
    """
    if os.environ.get("DALLE_TORCH_DIR"):
        return Path(os.environ["DALLE_TORCH_DIR"])
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places.append(Path(sysconfig.get_path("platlib")) / "torch")
    return next((place for place in places if (place / "version.py").is_file()), None)


def torch_info(folder):
    """Version tuple and CUDA version (or None) of the torch in `folder`, read from its version.py."""
    text = (folder / "version.py").read_text()
    version = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    cuda = re.search(r"^cuda[^=\n]*= '([\d.]+)'", text, re.MULTILINE)
    return (int(version[1]), int(version[2])), cuda[1] if cuda else None


def require(condition, message):
    if not condition:
        sys.exit(f"dalle-kernels cannot be built: {message}")


def cuda_options(torch_cuda):
    """What CMake is told of the CUDA library: what to build it with, or why it is left out."""
    asked, nvcc = os.environ.get("DALLE_CUDA", "auto"), shutil.which("nvcc")
    require(asked in ("0", "1", "auto"), f"DALLE_CUDA={asked!r} is not one of 0, 1, auto")
    require(asked != "1" or nvcc, "DALLE_CUDA=1 asks for the CUDA library, but nvcc is not on PATH")
    absent = None
    if asked == "0":
        absent = "DALLE_CUDA=0"
    elif not nvcc:
        absent = "nvcc is not on PATH"
    elif asked == "auto" and not torch_cuda:
        absent = "torch is a CPU build"
    if absent:
        return ["-DDALLE_CUDA=OFF", f"-DDALLE_CUDA_ABSENT={absent}"]
    archs = ";".join(cuda_archs())
    return ["-DDALLE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={archs}"]


def cuda_archs():
    """GPU architectures to compile for, as CMake writes them."""
    asked = os.environ.get("DALLE_CUDA_ARCHS")
    if asked:
        require(re.fullmatch(r"\d+a?(;\d+a?)*", asked), f"DALLE_CUDA_ARCHS={asked!r} is not of the form 80;90a")
        return [f"{arch}-real" for arch in asked.split(";")]
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True).stdout
    except OSError:
        found = ""
    visible = {line.strip().replace(".", "") for line in found.splitlines() if re.fullmatch(r"\d+\.\d", line.strip())}
    return [f"{arch}{'a' if arch == '90' else ''}-real" for arch in sorted(visible)] or CUDA_ARCHS


def host_options():
    """CMake options of the module _host, for the tests."""
    import pybind11

    return [
        "-DDALLE_HOST=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]


class CMakeBuild(build_ext):
    """One CMake project makes every library; setuptools only asks for it once."""

    def run(self):
        torch_dir = find_torch()
        require(torch_dir is not None, f'torch is not installed; run: pip install "{TORCH}"')
        require((torch_dir / "version.py").is_file(), f"DALLE_TORCH_DIR={torch_dir} is not the folder of torch")
        version, torch_cuda = torch_info(torch_dir)
        require(
            version >= MINIMUM_TORCH,
            f'torch {version[0]}.{version[1]} in {torch_dir} is too old; run: pip install --upgrade "{TORCH}"',
        )
        require(
            not self.inplace or importlib.util.find_spec("pybind11"),
            "pybind11 is missing; run: pip install pybind11 (or leave out --no-build-isolation)",
        )
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        require(cmake and ninja, "cmake or ninja is missing; run: pip install cmake ninja")
        named = shlex.split(os.environ.get("CXX", ""))[:1]
        require(
            any(shutil.which(compiler) for compiler in named or ("c++", "g++")),
            f"no C++ compiler was found{f' by the name {named[0]}' if named else ''}; "
            "install one (Debian, Ubuntu: apt-get install g++) or name it in CXX",
        )
        destination = ROOT / "dalle_kernels" if self.inplace else Path(self.build_lib).resolve() / "dalle_kernels"
        self.build(cmake, torch_dir, cuda_options(torch_cuda), destination)

    def build(self, cmake, torch_dir, cuda, destination):
        build_dir = Path(self.build_temp).resolve() if not self.inplace else ROOT / "build" / "inplace"
        cache = build_dir / "CMakeCache.txt"
        if cache.is_file():  # an isolated build leaves a cache that points at a deleted cmake
            command = re.search(r"^CMAKE_COMMAND:INTERNAL=(.*)$", cache.read_text(), re.MULTILINE)
            if not command or not Path(command[1]).exists():
                shutil.rmtree(build_dir)
        build_dir.mkdir(parents=True, exist_ok=True)
        destination.mkdir(parents=True, exist_ok=True)
        for stale in destination.glob("*.so"):
            stale.unlink()
        configure = [
            cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
            f"-DDALLE_TORCH_DIR={torch_dir}",
            *cuda,
            f"-DDALLE_VERSION={self.distribution.get_version()}",
            *(host_options() if self.inplace else ["-DDALLE_HOST=OFF"]),
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "-j", jobs], check=True)

    def get_outputs(self):
        return [str(path) for path in (Path(self.build_lib) / "dalle_kernels").glob("*.so")]


class PlatformWheel(bdist_wheel):
    """One wheel serves every Python 3: the libraries do not use Python's C API."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def temporary_folder():
    folder = tempfile.mkdtemp(prefix="dalle-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# A temporary folder, so that `pip install .` leaves nothing in the source folder. In-place builds use build/inplace.
scratch = temporary_folder()

# pip runs egg_info to ask what it must install to build a wheel: torch, if its isolated environment sees none.
needs_torch = "setuptools.build_meta" in sys.modules and "egg_info" in sys.argv and find_torch() is None

setup(
    packages=find_packages(include=["dalle_kernels*", "dalle*"]),
    package_data={"dalle": ["data/*.txt", "shipped/*", "py.typed"], "dalle_kernels": ["py.typed"]},
    ext_modules=[Extension("dalle_kernels.libdalle_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    options={"build": {"build_base": scratch}, "egg_info": {"egg_base": scratch}},
    setup_requires=[TORCH] if needs_torch else [],
    install_requires=[TORCH, "numpy>=1.26"],
)
