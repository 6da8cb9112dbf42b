"""Where the tests of Triton kernels run: on the CPU, in Triton's interpreter. They need a process of their own, because
TRITON_INTERPRET is read when Triton is imported: tests/test_triton_interpreter.py starts it. By hand:

TRITON_INTERPRET=1 python -m pytest -q tests/test_triton_sparse_attention.py
"""

import pytest
import torch

from dalle_kernels.backends.triton import interpreted

if not interpreted():
    pytest.skip("runs where TRITON_INTERPRET=1; test_triton_interpreter.py starts it", allow_module_level=True)
pytest.importorskip("triton", "3.9")  # older interpreters fail with newer NumPy

DEVICE = torch.device("cpu")
DTYPES = [torch.float32, torch.float16]  # the interpreter computes bfloat16 wrongly
