"""Where the tests of Triton kernels run: on the GPU, else on the CPU in Triton's interpreter. It needs
a process of its own, because TRITON_INTERPRET is read when Triton is imported: `make test-slow` does it, or

TRITON_INTERPRET=1 python -m pytest -q tests/test_triton_kernels.py
"""

import numpy as np
import pytest
import torch

import dalle_kernels as dk
from conformance import Target
from dalle_kernels.backends.triton import interpreted, launch, triton

ON_GPU = torch.cuda.is_available() and not interpreted()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = ("float32", "float16", *(["bfloat16"] if ON_GPU else []))  # the interpreter computes bfloat16 wrongly
TARGET = Target("triton", str(DEVICE), DTYPES, simulated=not ON_GPU)

if reasons := triton.reasons("sample_tokens", torch.empty(1, 1, device=DEVICE)):
    pytest.skip("; ".join(reasons), allow_module_level=True)
if not ON_GPU:
    pytest.importorskip("triton", "3.9")  # older interpreters fail with newer NumPy
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, _patch_lang

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        """Sums in float32, in steps of 16 products, whose order is the same for every row and for the transposed
        product, as on a GPU. NumPy's matmul, which the interpreter calls, promises neither on every processor.
        """
        left, right, total = a.data.astype(np.float64), b.data.astype(np.float64), d.data
        for k in range(0, left.shape[1], 16):
            step = np.einsum("mk,kn->mn", left[:, k : k + 16], right[k : k + 16])
            total = (total + step).astype(d.data.dtype)
        return TensorHandle(total, d.dtype.scalar)

    patched = set()

    def call(self, *args, **kwargs):
        """Calls a device function. Its module's triton.language is patched once, and again by every launch; the
        interpreter does it at every call, which takes a third of the time.
        """
        if self.fn.__module__ not in patched:
            _patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    InterpreterBuilder.create_dot = create_dot
    InterpretedFunction.__call__ = call


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    """Tensors are made there, and operations taken from this backend. The interpreter's time goes by steps, whatever
    their size: few and large ones for attention. For a test file to import.
    """
    if not ON_GPU:
        for kernel in ("sparse_attention", "sparse_attention.grad_q", "sparse_attention.grad_kv"):
            monkeypatch.setitem(launch.OVERRIDES, kernel, launch.Launch(64, 64, 4, 2))
    with DEVICE, dk.use_backend("triton"):
        yield
