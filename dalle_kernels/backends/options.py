"""The options of sparse_attention."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionOptions(NamedTuple):
    """What a call of `sparse_attention` asks for beyond its tensors and pattern, as operations take it."""

    text_lengths: torch.Tensor | None = None
    """int64 [B]: how many text keys of each sequence exist; None: all."""
    seed: torch.Tensor | None = None
    """int64 [B], of attention dropout; None: no dropout."""
    dropout_p: float = 0.0
    head_offset: int = 0


NO_OPTIONS = AttentionOptions()
