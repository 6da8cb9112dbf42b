"""libdalle_cuda.so, built here and loaded with a CPU build of torch: its operations are registered for CUDA, and fake
tensors (FakeTensorMode) pass through all of them.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest
import torch
from builds_for_tests import once
from torch._subclasses.fake_tensor import FakeTensorMode

import dalle_kernels as dk
from dalle_kernels import backends
from dalle_kernels.backends.native import CudaBackend
from dalle_kernels.backends.options import NO_OPTIONS

ROOT = Path(__file__).parents[1]
OPERATIONS = [
    "sparse_attention",
    "sparse_attention_backward",
    "decode_attention",
    "gumbel_softmax",
    "gumbel_softmax_backward",
    "sample_tokens",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
    pytest.mark.skipif(backends.cpu.problem is not None, reason="the schemas are in libdalle_cpu.so"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The package's library if it has one, else one built for PTX only, which is fastest."""
    if backends.cuda.problem is None:
        return "libdalle_cuda.so"
    return once(tmp_path_factory, "cuda", build) / "libdalle_cuda.so"


def build(folder):
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder,
        "DALLE_TORCH_DIR": Path(torch.__file__).parent,
        "DALLE_CUDA": "ON",
        "CMAKE_CUDA_ARCHITECTURES": "90-virtual",
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": sysconfig.get_path("include"),
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    options = [f"-D{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # cmake and ninja
    for command in (
        ["-G", "Ninja", "-S", ROOT, "-B", folder / "build", *options],
        ["--build", folder / "build", "--target", "dalle_cuda"],
    ):
        subprocess.run(["cmake", *command], check=True, env=environment)


@pytest.fixture
def cuda(library, monkeypatch):
    """The backend of that library, added to the others."""
    backend = CudaBackend(file=library)
    assert backend.problem is None
    monkeypatch.setitem(backends.BACKENDS, "cuda", backend)
    return backend


def test_it_needs_nothing_of_torchs_cuda_half(library):
    path = Path(dk.__file__).parent / library
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in needed
    assert "libtorch_cuda" not in needed and "libcudart" not in needed and "RPATH" not in needed


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_registered_for_cuda(cuda, operation):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dalle_kernels::{operation}", "CUDA")


def fake(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def is_like(tensor, shape, dtype, strides=None):
    return (
        tensor.device.type == "cuda"
        and list(tensor.shape) == list(shape)
        and tensor.dtype == dtype
        and (strides is None or tensor.stride() == strides)
    )


# These tests call the registered operations, because a CPU build of torch can neither run autograd on fake CUDA tensors
# nor upload a plan.
ops = torch.ops.dalle_kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_attention(cuda, dtype):
    with FakeTensorMode():
        q, k, v = fake(2, 29, 3, 7, 48, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
        plans = fake(99, dtype=torch.int32), fake(99, dtype=torch.int32), [99, 64, 64, 1, 0, 0, 99, 64, 32, 1, 0, 0]
        out, lse = ops.sparse_attention(q, k, v, *plans, 0.1, *NO_OPTIONS)
        assert is_like(out, q.shape, dtype, torch.empty_like(q).stride())
        assert is_like(lse, q.shape[:3], torch.float32)
        gradients = ops.sparse_attention_backward(torch.empty_like(out), q, k, v, out, lse, *plans, 0.1, *NO_OPTIONS)
        assert all(is_like(g, x.shape, dtype) for g, x in zip(gradients, (q, k, v)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax(cuda, dtype, hard):
    with FakeTensorMode():
        logits = fake(2, 30, 4, 5, dtype=dtype)
        y, kl = dk.gumbel_softmax(logits, 0.5, hard, dim=1, return_kl=True, backend="cuda")
        assert is_like(y, logits.shape, dtype, logits.stride())
        assert is_like(kl, (2, 4, 5), torch.float32)
        scalars = fake(dtype=torch.int64), fake()
        stored = None if hard else y, logits, kl, fake(2, 2, 4, 5)
        gradient = ops.gumbel_softmax_backward(y, kl, *stored, *scalars, hard, 1)
        assert is_like(gradient, logits.shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_tokens(cuda, dtype):
    with FakeTensorMode():
        tokens = dk.sample_tokens(fake(6, 100, dtype=dtype), top_k=10, top_p=0.9, backend="cuda")
        assert is_like(tokens, (6,), torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_attention(cuda, dtype):
    with FakeTensorMode():
        q, k, v = fake(3, 6, 4, 40, dtype=dtype).unbind(0)
        cache = *(fake(2, 4, 9, 40, dtype=dtype) for _ in range(2)), *(fake(6, 4, 5, 40, dtype=dtype) for _ in range(2))
        step = fake(dtype=torch.int64)
        assert is_like(ops.decode_attention(q, k, v, *cache, fake(99, dtype=torch.int32), step, 0.1), q.shape, dtype)
        ops.decode_advance(step, 20)


def test_what_it_cannot_take_is_said(cuda):
    pattern = dk.AttentionPattern.row(2, (2, 2))
    with FakeTensorMode():
        for q, reason in (
            (fake(1, 1, 6, 130), "head dims up to 128"),
            (fake(1, 1, 6, 64, dtype=torch.float64), "float64"),
        ):
            with pytest.raises(NotImplementedError, match=reason):
                dk.sparse_attention(q, q, q, pattern, backend="cuda")
    with pytest.raises(NotImplementedError, match="it supports cuda tensors, not cpu"):
        dk.sample_tokens(torch.zeros(2, 3), backend="cuda")
