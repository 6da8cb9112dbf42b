"""Checks of arguments that several operations share."""

from __future__ import annotations

import textwrap

import torch
from torch.autograd import forward_ad

from .compile import intercepted

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raises TypeError unless the operations support the dtype."""
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {dtype}")


def usable_device(device: torch.device | str | None) -> torch.device:
    """`device` with its index ("cuda" -> "cuda:0"); None: torch's default device.

    Raises:
        ValueError: PyTorch cannot use it.
    """
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = textwrap.shorten(str(error).partition(". ")[0], 100, placeholder="...")  # without lists of devices
        raise ValueError(f"device must be one that this PyTorch can use; got {str(device)!r}: {reason}") from error


def check_text_lengths(lengths: torch.Tensor, count: int, text_len: int, device: torch.device) -> None:
    """Raises ValueError unless `lengths` is an int64 tensor [count] on `device`, with values from 0 to text_len. Values
    are read on a CPU in eager code only; elsewhere the kernels take others as the nearest of these.
    """
    if not isinstance(lengths, torch.Tensor):
        raise ValueError(f"text_lengths must be an int64 tensor [{count}]; got {type(lengths).__name__}")
    if lengths.dtype != torch.int64 or lengths.shape != (count,) or lengths.device != device:
        raise ValueError(
            f"text_lengths must be an int64 tensor [{count}] on {device}; got {lengths.dtype} {list(lengths.shape)} on "
            f"{lengths.device}"
        )
    readable = device.type == "cpu" and not torch.compiler.is_compiling() and not intercepted()
    if readable and count and not bool(((lengths >= 0) & (lengths <= text_len)).all()):
        raise ValueError(f"text_lengths must lie in [0, {text_len}], the pattern's text_len; got {lengths.tolist()}")


def differentiated(*tensors: torch.Tensor) -> bool:
    """Whether a derivative with respect to one of the tensors is recorded, in reverse or in forward mode."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
