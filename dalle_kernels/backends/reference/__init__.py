"""The reference backend: plain PyTorch, any dtype and device, float64 included. The specification of every operation,
and the oracle of every test.
"""

from __future__ import annotations

from ..base import Backend


class ReferenceBackend(Backend):
    """Takes everything."""

    name = "reference"
    devices = dtypes = max_head_dim = None
    capturable = False  # decode_attention reads the step on the host

    def __init__(self) -> None:
        super().__init__()
        self.load()


reference = ReferenceBackend()
