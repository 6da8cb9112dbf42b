"""The reference backend: plain PyTorch for any device and floating-point dtype, including float64. It specifies every
operation, and tests compare the other backends with it.
"""

from __future__ import annotations

from ..base import Backend


class ReferenceBackend(Backend):
    """Runs every problem."""

    name = "reference"
    devices = dtypes = max_head_dim = None
    options = True
    capturable = False  # decode_attention reads the step on the host

    def __init__(self) -> None:
        super().__init__()
        self.load()


reference = ReferenceBackend()
