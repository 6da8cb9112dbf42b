"""torch.autocast, with the rules that PyTorch has for its own attention and softmax."""

from __future__ import annotations

import contextlib

import torch


def enabled(tensor: torch.Tensor) -> bool:
    """Whether torch.autocast is enabled for the tensor's device."""
    if not torch._C._is_any_autocast_enabled():
        return False
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def disabled(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the tensor's device; plain PyTorch in it computes in the dtypes of its arguments.
    """
    return torch.autocast(tensor.device.type, enabled=False) if enabled(tensor) else contextlib.nullcontext()


def attention(*tensors: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as autocast passes them to `scaled_dot_product_attention`: in its dtype, or in
    `dtype` if it is given, except float64. Without autocast, the same tensors.
    """
    if not enabled(tensors[0]):
        return tensors
    dtype = dtype or torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Logits as autocast passes them to `softmax`: in float32 except on a CPU. Without autocast, the same tensor."""
    if not enabled(logits) or logits.device.type == "cpu" or logits.dtype == torch.float64:
        return logits
    return logits.float()
