"""Attention over a static sparse pattern."""

from __future__ import annotations

from typing import Literal, overload

import torch

from . import autocast, backends
from .arguments import check_dtype
from .backends.base import rows_contiguous
from .patterns import AttentionPattern


@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q kᵀ · scale) v over the pairs that `pattern` allows (Ramesh et al. 2021, App. B.1: one softmax over
    text and image keys together).

    Args:
        q, k, v: [B, H, N, D] with N <= pattern.seq_len; float32, bfloat16 or float16 (float64 on "reference"), one
            dtype and device. Strides are arbitrary if the last dimension is contiguous; other tensors are copied. D
            from 1 to 128; 32, 64 and 128 run without padding. Heads come before tokens: transpose(1, 2) a [B, N, H, D].
            torch.autocast casts them as it does those of scaled_dot_product_attention.
        pattern: which query attends to which key; its first N tokens are used.
        scale: factor of the scores; None: D ** -0.5.
        return_lse: also return the log-sum-exp of each query's scores.
        backend: "cuda", "triton", "cpu" or "reference"; None: the first of these that can run the problem.

    Returns:
        out [B, H, N, D] in q's dtype and memory order. With `return_lse` the pair (out, lse): lse [B, H, N] is float32,
        natural logarithm, not differentiable.

    Raises:
        ValueError: shapes or devices differ, or N exceeds the pattern.
        TypeError: an argument has the wrong type or dtype.
        NotImplementedError: the backend cannot run the problem, or (except on "reference") double backward or a
            forward-mode derivative.
    """
    q, k, v = _checked(q, k, v, pattern)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    out, lse = backends.dispatch("sparse_attention", q, backend)(q, k, v, pattern, float(scale))
    return (out, lse) if return_lse else out


def _checked(q, k, v, pattern):
    """q, k and v as kernels take them."""
    if not isinstance(pattern, AttentionPattern):
        raise TypeError(f"pattern must be an AttentionPattern; got {type(pattern).__name__}")
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        kinds = [type(x).__name__ for x in (q, k, v)]
        raise TypeError(f"q, k and v must be tensors; got {kinds[0]}, {kinds[1]} and {kinds[2]}")
    q, k, v = autocast.attention(q, k, v)
    shape = q.shape
    if len(shape) != 4 or shape != k.shape or shape != v.shape:
        raise ValueError(
            f"q, k and v must share one shape [B, H, N, D]; got {list(shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"q, k and v must share one floating-point dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    check_dtype("the dtype of q, k and v", q.dtype)
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device} and {v.device}")
    if not 1 <= shape[2] <= pattern.seq_len:
        raise ValueError(f"N must lie in [1, {pattern.seq_len}], the pattern's length; got {shape[2]}")
    if shape[3] < 1:
        raise ValueError(f"the head dim must be at least 1; got {shape[3]}")
    return rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
