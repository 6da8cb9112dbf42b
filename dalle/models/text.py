"""Checks token ids of captions before a model reads them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle.errors import UserError


def fit_text(ids: Sequence[int], vocab: int, max_tokens: int, truncate: bool, model: str) -> Tensor:
    """Token ids of a caption as int64 [n], n <= max_tokens, truncated if `truncate` is set.

    Raises:
        UserError: there are more than `max_tokens` ids and `truncate` is off, or an id is not in [0, vocab). The
            message names the `model`.
    """
    if len(ids) > max_tokens and not truncate:
        raise UserError(
            f"the caption has {len(ids)} tokens and {model} reads at most {max_tokens}: "
            "shorten it or truncate it (--truncate)"
        )
    if bad := [i for i in ids if not 0 <= i < vocab]:
        raise UserError(f"text id {bad[0]} is not in the vocabulary of {vocab} tokens")
    return torch.as_tensor(ids[:max_tokens], dtype=torch.int64)
