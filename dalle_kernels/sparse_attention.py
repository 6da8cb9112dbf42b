"""Attention over a static sparse pattern."""

from __future__ import annotations

from typing import Literal, overload

import torch

from . import autocast, backends
from .arguments import check_dtype, check_text_lengths
from .backends.base import rows_contiguous
from .backends.options import NO_OPTIONS, AttentionOptions
from .patterns import AttentionPattern
from .philox import seeds_of
from .sharding import attend_locally, is_sharded


@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    text_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    head_offset: int = 0,
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
    text_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    head_offset: int = 0,
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
    text_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    head_offset: int = 0,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q kᵀ · scale) v over the pairs that `pattern` allows (Ramesh et al. 2021, App. B.1: one softmax over
    text and image keys together).

    Args:
        q: [B, H, M, D]; float32, bfloat16 or float16 (float64 on "reference"). Strides are arbitrary if the last
            dimension is contiguous; other tensors are copied. D from 1 to 128; 32, 64 and 128 run without padding.
            Heads come before tokens: transpose(1, 2) a [B, N, H, D]. torch.autocast casts q, k and v as it does those
            of scaled_dot_product_attention.
        k, v: [B, K, N, D] with N <= pattern.seq_len, in q's dtype and on its device. K divides H: H / K consecutive
            heads of q share one of k and v (grouped queries). M <= N: the queries are the last M of the N tokens, as
            when a sequence continues from cached keys. q, k and v may be DTensors that are sharded over B or the heads,
            or replicated: every rank computes what it holds, and the results are DTensors placed as q.
        pattern: which query attends to which key; its first N tokens are used.
        scale: factor of the scores; None: D ** -0.5.
        return_lse: also return the log-sum-exp of each query's scores.
        text_lengths: int64 [B], from 0 to pattern.text_len: how many text tokens of each sequence exist. No query
            attends to the others; their own results are 0 (lse: -inf), and so are their gradients. None: all exist.
        dropout_p: probability in [0, 1) that a pair is dropped after the softmax; the others are divided by
            1 - dropout_p.
        seed: of the dropout, an int64 tensor [B] or an int, from which the seeds of all B sequences are derived; None:
            new seeds from torch's generator. Which pairs are dropped is a function of (seed of the sequence,
            head_offset + head, query, key) only (see `dalle_kernels.philox`).
        head_offset: number of q's first head, if the heads of a layer are split between calls.
        backend: "cuda", "triton", "cpu" or "reference"; None: the first of these that can run the problem. "cuda" and
            "triton" run neither K != H, M != N, text_lengths, dropout, nor a pattern that is not causal.

    Returns:
        out [B, H, M, D] in q's dtype and memory order. With `return_lse` the pair (out, lse): lse [B, H, M] is float32,
        natural logarithm, not differentiable.

    Raises:
        ValueError: shapes or devices do not fit, N exceeds the pattern, or an option is out of range.
        TypeError: an argument has the wrong type or dtype.
        NotImplementedError: the backend cannot run the problem, or (except on "reference") double backward or a
            forward-mode derivative.
    """
    if is_sharded(q, k, v):
        shared = dict(scale=scale, return_lse=return_lse, backend=backend)
        return attend_locally(sparse_attention, q, k, v, pattern, text_lengths, dropout_p, seed, head_offset, **shared)
    q, k, v = _checked(q, k, v, pattern)
    options = NO_OPTIONS
    if text_lengths is not None or dropout_p:
        options = _options(q, pattern, text_lengths, dropout_p, seed, head_offset)
    uses = ()
    if options is not NO_OPTIONS or q.shape != k.shape or not pattern.is_causal:
        uses = _uses(q, k, pattern, options)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    run = backends.dispatch("sparse_attention", q, backend, uses)
    out, lse = run(q, k, v, pattern, float(scale), options)
    return (out, lse) if return_lse else out


def _checked(q, k, v, pattern):
    """q, k and v as kernels take them."""
    if not isinstance(pattern, AttentionPattern):
        raise TypeError(
            f"pattern must be an AttentionPattern; got {type(pattern).__name__} (AttentionPattern.from_mask makes one "
            "of a static mask; for masks that depend on data, use scaled_dot_product_attention or FlexAttention)"
        )
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        kinds = [type(x).__name__ for x in (q, k, v)]
        raise TypeError(f"q, k and v must be tensors; got {kinds[0]}, {kinds[1]} and {kinds[2]}")
    q, k, v = autocast.attention(q, k, v)
    shape = q.shape
    if len(shape) != 4 or shape != k.shape or shape != v.shape:
        _check_shapes(q, k, v)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"q, k and v must share one floating-point dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    check_dtype("the dtype of q, k and v", q.dtype)
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device} and {v.device}")
    if not 1 <= k.shape[2] <= pattern.seq_len:
        raise ValueError(f"N must lie in [1, {pattern.seq_len}], the pattern's length; got {k.shape[2]}")
    if shape[3] < 1:
        raise ValueError(f"the head dim must be at least 1; got {shape[3]}")
    return rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)


def _check_shapes(q, k, v):
    """Checks the shapes of tensors that do not share one shape [B, H, N, D]."""
    shapes = f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q must be [B, H, M, D], and k and v [B, K, N, D]; {shapes}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of k and v must divide those of q; {shapes}")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(
            f"queries must be the last of the keys' tokens, so at most as many; {shapes} (for attention to the keys of "
            "another sequence, use scaled_dot_product_attention)"
        )


def _options(q, pattern, text_lengths, dropout_p, seed, head_offset):
    batch = q.shape[0]
    if text_lengths is not None:
        check_text_lengths(text_lengths, batch, pattern.text_len, q.device)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1); got {dropout_p}")
    if isinstance(head_offset, bool) or not isinstance(head_offset, int) or head_offset < 0:
        raise ValueError(f"head_offset must be a whole number of at least 0; got {head_offset!r}")
    seeds = seeds_of(seed, batch, q.device) if dropout_p else None
    return AttentionOptions(text_lengths, seeds, float(dropout_p), head_offset)


def _uses(q, k, pattern, options):
    """What a call uses that only some backends have, in words."""
    used = {
        "grouped queries": q.shape[1] != k.shape[1],
        "keys before the first query": q.shape[2] != k.shape[2],
        "patterns that are not causal": not pattern.is_causal,
        "text_lengths": options.text_lengths is not None,
        "dropout": options.seed is not None,
    }
    return tuple(name for name, yes in used.items() if yes)
