"""Attention of newly generated image tokens over cached keys and values."""

from __future__ import annotations

import torch

from . import backends
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
    """Attention of one new image token per sequence: what `sparse_attention` gives for this row of the layer's pattern.

    The new key and value are written into the cache first, and a token sees itself; repeating a call within a step
    changes nothing. The bits of a sequence's result do not depend on how many prompts and candidates the cache holds.

    Args:
        q, k, v: [P * C, H, D] in the cache's dtype; any strides with a contiguous last dimension are taken as they are.
        cache: the cache; its step says which token this is.
        layer: which of the cache's layers.
        scale: factor of the scores; D ** -0.5 where omitted.
        backend: "cuda", "triton", "cpu" or "reference"; the best one that can where omitted.

    Returns:
        [P * C, H, D], contiguous, in the same dtype.

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes or devices that are not the cache's, no such layer,
            no prefix written yet, more steps than the image has tokens (found on a CPU only), or a gradient asked for.
    """
    cache.check_step(layer, q, k, v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise NotImplementedError("decode_attention has no gradient; call it under torch.inference_mode()")
    stored = cache.layer(layer)
    run = backends.dispatch("decode_attention", q, backend)
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale <= 0:  # kernels take maxima of products that are not scaled yet
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    cached = stored.prefix_k, stored.prefix_v, stored.image_k, stored.image_v
    return run(q, k, v, *cached, stored.schedule, cache.step, scale)
