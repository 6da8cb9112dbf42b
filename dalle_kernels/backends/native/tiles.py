"""The tile shapes of the compiled kernels."""

from __future__ import annotations

import torch

from ...plan import TileShape
from ..plans import Tiles

TILES = {  # by device type
    "cpu": Tiles(TileShape(32, 8, longest_run=16, split=64, max_splits=128)),
    "cuda": Tiles(TileShape(64, 64, longest_run=1, split=16), TileShape(64, 32, longest_run=1, split=16)),
}


def tiles(device: torch.device, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The same for every head dim and dtype."""
    return TILES[device.type]
