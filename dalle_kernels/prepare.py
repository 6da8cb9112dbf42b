"""Ahead-of-time preparation of attention patterns."""

from __future__ import annotations

import torch

from . import backends
from .patterns import AttentionPattern


def prepare(
    pattern: AttentionPattern,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    n: int | None = None,
) -> None:
    """Compiles and uploads the plans of a pattern, so that the first call of `sparse_attention` does not. On "triton"
    that call still compiles the kernels.

    Args:
        pattern: the pattern.
        device, dtype, head_dim: those of q, k and v. They select the backend; `use_backend` is respected.
        n: sequence length; None: the pattern's length.

    Raises:
        ValueError: `n` or `head_dim` is out of range, or PyTorch cannot use the device.
        TypeError: `pattern` is not an AttentionPattern, or `dtype` is not floating point.
        NotImplementedError: the forced backend cannot run such tensors.
    """
    if not isinstance(pattern, AttentionPattern):
        raise TypeError(f"pattern must be an AttentionPattern; got {type(pattern).__name__}")
    n = pattern.seq_len if n is None else n
    if not 1 <= n <= pattern.seq_len:
        raise ValueError(f"n must lie in [1, {pattern.seq_len}], the pattern's length; got {n}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype; got {dtype}")
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1; got {head_dim}")
    try:
        like = torch.empty(0, head_dim, dtype=dtype, device=device)  # its device has an index ("cuda" -> "cuda:0")
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that this PyTorch can use; got {str(device)!r}: {reason}") from error
    backends.select("sparse_attention", like).prepare(pattern, n, like)
