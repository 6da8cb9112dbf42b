"""Captions as the models read them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle.errors import UserError


def fit_text(ids: Sequence[int], vocab: int, room: int, truncate: bool, reader: str) -> Tensor:
    """Token ids of a caption as int64 [n], n <= room.

    Raises:
        UserError: there are more than `room`, all that `reader` reads, and `truncate` is off; or one is out of range.
    """
    if len(ids) > room and not truncate:
        raise UserError(
            f"the caption has {len(ids)} tokens and {reader} reads at most {room}: "
            "shorten it or have it cut (--truncate)"
        )
    if bad := [i for i in ids if not 0 <= i < vocab]:
        raise UserError(f"text id {bad[0]} is not in the vocabulary of {vocab} tokens")
    return torch.as_tensor(ids[:room], dtype=torch.int64)
