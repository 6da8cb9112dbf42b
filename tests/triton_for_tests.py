"""Where the tests of Triton kernels run: on the GPU, else on the CPU in Triton's interpreter. It needs
a process of its own, because TRITON_INTERPRET is read when Triton is imported: `make test-slow` does it, or

TRITON_INTERPRET=1 python -m pytest -q tests/test_triton_sparse_attention.py
"""

import pytest
import torch

import dalle_kernels as dk
from dalle_kernels.backends.triton import interpreted, triton

ON_GPU = torch.cuda.is_available() and not interpreted()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]  # that the interpreter computes wrongly

if reasons := triton.reasons("sample_tokens", torch.empty(1, 1, device=DEVICE)):
    pytest.skip("; ".join(reasons), allow_module_level=True)
if not ON_GPU:
    pytest.importorskip("triton", "3.9")  # older interpreters fail with newer NumPy


@pytest.fixture(autouse=True)
def on_device():
    """Tensors are made there, and operations taken from this backend, also by what is borrowed from tests of others.
    For a test file to import.
    """
    with DEVICE, dk.use_backend("triton"):
        yield
