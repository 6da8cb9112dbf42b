"""The GPUs and problems that the `cuda` backend supports, with stand-ins for GPUs."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle_kernels import backends
from dalle_kernels.backends import native

KIB = 1024

pytestmark = pytest.mark.skipif(backends.cpu.problem is not None, reason="its operations are those of libdalle_cpu.so")


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, bytes of shared memory) simulates such a GPU."""

    def show(capability, shared_memory):
        major, minor = capability
        properties = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=shared_memory)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return show


def reasons(operation, *shape, dtype):
    backend = native.CudaBackend(file="libdalle_cpu.so")
    with FakeTensorMode():
        return " ".join(backend.reasons(operation, torch.empty(shape, dtype=dtype, device="cuda")))


def test_old_gpus_are_declined(gpu):
    gpu((7, 5), 64 * KIB)
    assert "compute capability 8.0 or newer" in reasons("sample_tokens", 2, 9, dtype=torch.float32)


@pytest.mark.parametrize(("capability", "shared_memory"), [((8, 6), 99), ((8, 9), 99), ((12, 0), 99)])
def test_wide_float32_attention_needs_more_shared_memory_than_some_gpus_have(gpu, capability, shared_memory):
    gpu(capability, shared_memory * KIB)
    assert "head dims up to 64 on this GPU, not 65" in reasons("sparse_attention", 1, 1, 6, 65, dtype=torch.float32)
    assert not reasons("sparse_attention", 1, 1, 6, 64, dtype=torch.float32)
    assert not reasons("sparse_attention", 1, 1, 6, 128, dtype=torch.bfloat16)
    assert not reasons("decode_attention", 1, 1, 128, dtype=torch.float32)
    assert not reasons("gumbel_softmax", 1, 8192, dtype=torch.float32)


@pytest.mark.parametrize(("capability", "shared_memory"), [((8, 0), 163), ((9, 0), 227), ((10, 0), 227)])
def test_the_others_take_it(gpu, capability, shared_memory):
    gpu(capability, shared_memory * KIB)
    assert not reasons("sparse_attention", 1, 1, 6, 128, dtype=torch.float32)


def test_no_visible_gpu_is_no_reason():
    if not torch.cuda.is_available():
        assert not reasons("sparse_attention", 1, 1, 6, 128, dtype=torch.float32)


def test_the_gpu_is_asked_while_tracing():
    backend = native.CudaBackend(file="libdalle_cpu.so")

    def ask(x):
        return x + 1 if backend.device_problem("gumbel_softmax", x) is None else x

    x = torch.ones(2, device="cuda" if torch.cuda.is_available() else "cpu")
    assert torch.equal(torch.compile(ask, backend="eager", fullgraph=True)(x), x + 1)
