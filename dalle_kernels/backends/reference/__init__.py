"""The reference backend: plain PyTorch, any dtype and device, float64 included. The specification of every operation,
and the oracle of every test.
"""

from .decode_attention import decode_attention
from .gumbel_softmax import gumbel_softmax
from .sample_tokens import sample_tokens
from .sparse_attention import sparse_attention

name = "reference"


def reasons(operation, tensor):
    """Nothing keeps the reference from running anything."""
    return ()


__all__ = ["decode_attention", "gumbel_softmax", "name", "reasons", "sample_tokens", "sparse_attention"]
