"""The reference backend: plain PyTorch, any dtype and device, float64 included. The specification of every operation, and the oracle of every test."""

from .sparse_attention import sparse_attention

name = "reference"


def reasons(operation, tensor):
    """Nothing keeps the reference from running anything."""
    return ()


__all__ = ["name", "reasons", "sparse_attention"]
