"""The problems that the `triton` backend supports and declines, and that it is not imported unless queried."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dalle_kernels as dk
from dalle_kernels import backends
from dalle_kernels.backends.triton import _gpu_problem, _load, interpreted, launch

ROOT = Path(dk.__file__).parents[1]


def test_its_kernels_are_not_imported_where_nobody_asks():
    code = """
import sys, torch
import dalle_kernels as dk
q = torch.randn(1, 1, 6, 8)
dk.sparse_attention(q, q, q, dk.AttentionPattern.row(2, (2, 2)))
assert "dalle_kernels.backends.triton" in sys.modules
assert "dalle_kernels.backends.triton.sparse_attention" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (None, "Triton cannot be imported"),
        (SimpleNamespace(__version__="3.5.1"), "it needs Triton 3.6 or newer, not 3.5.1"),
    ],
    ids=["missing", "old"],
)
def test_without_triton_only_this_backend_is_missing(module, problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", module)
    _load.cache_clear()
    try:
        assert problem in backends.triton.problem
        with FakeTensorMode():
            (reason,) = backends.triton.reasons("sparse_attention", torch.empty(1, 1, 6, 8, device="cuda"))
        assert problem in reason
        q = torch.randn(1, 1, 6, 8)
        dk.sparse_attention(q, q, q, dk.AttentionPattern.row(2, (2, 2)))
    finally:
        _load.cache_clear()


def test_it_says_what_it_does_not_take():
    pattern = dk.AttentionPattern.row(2, (2, 2))
    q = torch.zeros(1, 1, 6, 8)
    refused = (q.bfloat16(), "not torch.bfloat16") if interpreted() else (q, "it supports cuda tensors, not cpu")
    with pytest.raises(NotImplementedError, match=refused[1]):
        dk.sparse_attention(refused[0], refused[0], refused[0], pattern, backend="triton")
    with FakeTensorMode():
        for shape, dtype, reason in (((1, 1, 6, 129), None, "head dims up to 128"), ((6,), torch.float64, "float64")):
            x = torch.empty(shape, dtype=dtype, device="cuda")
            assert reason in backends.triton.reasons("sparse_attention", x)[0]


def test_old_gpus_are_declined(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, declined in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert ("compute capability 8.0" in (_gpu_problem(torch.device("cuda")) or "")) == declined


def test_a_gpu_without_a_c_compiler_is_declined(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "C compiler" in _gpu_problem(torch.device("cuda"))
    monkeypatch.setenv("CC", "/opt/cc")
    assert _gpu_problem(torch.device("cuda")) is None


@pytest.mark.parametrize("kernel", launch.TABLE)
def test_the_table(kernel):
    """Every head dim and element size has a line for ANY architecture, with a valid tile shape."""
    lines = launch.TABLE[kernel]
    for dim in (32, 64, 128) if "attention" in kernel else (0,):
        for bytes in (2, 4):
            assert launch.in_table(kernel, "sm_75", dim, bytes) == lines[launch.ANY, dim, bytes]
            for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
                line = launch.in_table(kernel, architecture, dim, bytes)
                assert all(size & (size - 1) == 0 for size in line[:2]), "powers of two"
                if kernel.startswith("sparse_attention"):
                    assert line.rows % 32 == 0 and line.columns % 16 == 0
                if kernel == "sparse_attention.grad_q":  # reads the same plan
                    assert line[:2] == launch.in_table("sparse_attention", architecture, dim, bytes)[:2]


def test_overrides_go_before_the_table(monkeypatch):
    line = launch.Launch(128, 16, 2, 5)
    monkeypatch.setitem(launch.OVERRIDES, "sparse_attention", line)
    assert launch.lookup("sparse_attention", torch.device("cpu"), 40, torch.float16) == line
    assert launch.lookup("sparse_attention.grad_kv", torch.device("cpu"), 40, torch.float16) != line
