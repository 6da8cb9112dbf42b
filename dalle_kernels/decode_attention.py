"""Attention of new tokens over cached keys and values."""

from __future__ import annotations

import torch

from . import autocast, backends
from .arguments import differentiated
from .backends.base import rows_contiguous
from .decode_cache import DecodeCache


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: DecodeCache,
    layer: int,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of one new token per sequence: one row of `sparse_attention` with the layer's pattern. The token is the
    next one of the image or, where `cache.decodes_text(layer)`, of the text.

    The new key and value are first written to the cache, since a token attends to itself; repeating a call within a
    step changes nothing. The result is batch-invariant: it does not depend on the number of prompts and candidates.

    Args:
        q, k, v: [P * C, H, D] in the cache's dtype. Strides are arbitrary if the last dimension is contiguous; other
            tensors are copied. torch.autocast casts them to the cache's dtype.
        cache: the cache; its step is the position of a new token in the image.
        layer: index of a layer of the cache.
        scale: factor of the scores; None: D ** -0.5.
        backend: "cuda", "triton", "cpu" or "reference"; None: the first of these that can run the problem.

    Returns:
        [P * C, H, D], contiguous, in the same dtype.

    Raises:
        ValueError: shapes or devices differ from the cache's, the layer does not exist or lacks a part of its prefix,
            or the image is complete (detected on a CPU only; elsewhere the result is NaN).
        TypeError: the dtype differs from the cache's.
        NotImplementedError: a derivative is required, or the backend cannot run the problem.
    """
    q, k, v = autocast.attention(q, k, v, dtype=cache.dtype)
    cache.check_step(layer, q, k, v)
    if differentiated(q, k, v):
        raise NotImplementedError("decode_attention has no derivative; call it under torch.inference_mode()")
    run = backends.dispatch("decode_attention", q, backend, cache.uses)
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale <= 0:  # kernels take the maximum before scaling, which needs a positive scale
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    of_text, lengths = cache.decodes_text(layer), cache.text_lengths
    out = run(q, k, v, *cache.begin_step(layer), scale, None if of_text else lengths)
    if of_text and lengths is not None:  # as in sparse_attention, absent text gives 0
        out = out.masked_fill((lengths <= cache.next_position(layer))[:, None, None], 0)
    return out
