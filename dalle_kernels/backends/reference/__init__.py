"""The reference backend: plain PyTorch, any dtype and device, float64 included. The specification of every operation, and the oracle of every test."""

from .decode_attention import decode_attention
from .sparse_attention import sparse_attention

name = "reference"


def reasons(operation, tensor):
    """Nothing keeps the reference from running anything."""
    return ()


__all__ = ["decode_attention", "name", "reasons", "sparse_attention"]
