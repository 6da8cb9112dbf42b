"""What the `triton` backend takes and declines, and that it costs nothing where it is not asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dalle_kernels as dk
from dalle_kernels import backends
from dalle_kernels.backends import triton as package
from dalle_kernels.backends.triton import launch

ROOT = Path(dk.__file__).parents[1]


def python(code, **environment):
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_and_running_elsewhere_does_not_import_triton():
    code = """
import sys, torch
before = "triton" in sys.modules
import dalle_kernels as dk
q = torch.randn(1, 1, 6, 8)
dk.sparse_attention(q, q, q, dk.AttentionPattern.row(2, (2, 2)))
print(before or "triton" not in sys.modules)
"""
    assert python(code, TRITON_INTERPRET="0").strip() == "True"


def test_without_triton_only_this_backend_is_missing(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('there is none')")
    code = """
import torch, dalle_kernels as dk
from dalle_kernels.backends import BACKENDS
from dalle_kernels.info import collect
assert BACKENDS["triton"].problem == "Triton cannot be imported: there is none", BACKENDS["triton"].problem
assert collect()["libraries"]["triton"] == BACKENDS["triton"].problem
q = torch.randn(1, 1, 6, 8)
dk.sparse_attention(q, q, q, dk.AttentionPattern.row(2, (2, 2)))
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    python(code, PYTHONPATH=path, TRITON_INTERPRET="0")


def test_an_old_triton_is_declined(tmp_path):
    (tmp_path / "triton.py").write_text("__version__ = '3.5.1'")
    code = "from dalle_kernels.backends import BACKENDS; print(BACKENDS['triton'].problem)"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert "it takes Triton 3.6 or newer, not 3.5.1" in python(code, PYTHONPATH=path)


def test_it_says_what_it_does_not_take(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pattern = dk.AttentionPattern.row(2, (2, 2))
    q = torch.zeros(1, 1, 6, 8)
    with pytest.raises(NotImplementedError, match="it takes cuda tensors, not cpu"):
        dk.sparse_attention(q, q, q, pattern, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotImplementedError, match="computes bfloat16 wrongly"):
        dk.sparse_attention(q.bfloat16(), q.bfloat16(), q.bfloat16(), pattern, backend="triton")
    with FakeTensorMode():
        for shape, dtype, reason in (((1, 1, 6, 129), None, "head dims up to 128"), ((6,), torch.float64, "float64")):
            x = torch.empty(shape, dtype=dtype, device="cuda")
            assert reason in backends.triton.reasons("sparse_attention", x)[0]


def test_old_gpus_are_declined(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, declined in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert ("compute capability 8.0" in (package._gpu_problem(torch.device("cuda")) or "")) == declined


@pytest.mark.parametrize("kernel", launch.TABLE)
def test_the_table(kernel):
    """Every head dim and size of an element has a line, for any architecture; plans can be cut so."""
    lines = launch.TABLE[kernel]
    for dim in (32, 64, 128):
        for bytes in (2, 4):
            assert launch.in_table(kernel, "sm_75", dim, bytes) == lines[launch.ANY, dim, bytes]
            for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
                line = launch.in_table(kernel, architecture, dim, bytes)
                assert line.rows % 32 == 0 and line.columns % 16 == 0
                if kernel == "sparse_attention.grad_q":  # on the same plan
                    assert line[:2] == launch.in_table("sparse_attention", architecture, dim, bytes)[:2]


def test_overrides_go_before_the_table(monkeypatch):
    line = launch.Launch(128, 16, 2, 5)
    monkeypatch.setitem(launch.OVERRIDES, "sparse_attention", line)
    assert launch.lookup("sparse_attention", torch.device("cpu"), 40, torch.float16) == line
    assert launch.lookup("sparse_attention.grad_kv", torch.device("cpu"), 40, torch.float16) != line
