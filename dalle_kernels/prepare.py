"""Ahead-of-time preparation of attention patterns."""

from __future__ import annotations

import torch

from . import backends
from .arguments import check_dtype, usable_device
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
    check_dtype("dtype", dtype)
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1; got {head_dim}")
    like = torch.empty(0, head_dim, dtype=dtype, device=usable_device(device))
    backends.select("sparse_attention", like).prepare(pattern, n, like)
