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
    """Compiles and uploads the plans that `sparse_attention` reads for a pattern, which its first call would do. (On
    "triton" that call still compiles the kernels.)

    Args:
        pattern: the pattern.
        device, dtype, head_dim: of q, k and v. The backend that will run them is asked, `use_backend` included.
        n: sequence length; the pattern's whole length where omitted.

    Raises:
        ValueError, TypeError, NotImplementedError: as `sparse_attention` of such tensors; ValueError also for a device
            that PyTorch cannot use.
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
        like = torch.empty(0, head_dim, dtype=dtype, device=device)  # its device has a number, as those of all tensors
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that this PyTorch can use; got {str(device)!r}: {reason}") from error
    backends.select("sparse_attention", like).prepare(pattern, n, like)
