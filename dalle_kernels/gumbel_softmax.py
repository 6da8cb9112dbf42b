"""Gumbel-softmax, with the KL divergence from the uniform distribution in the same pass."""

from __future__ import annotations

from typing import Literal, overload

import torch

from . import autocast, backends
from .arguments import check_dtype, differentiated
from .philox import as_seed, fresh_seed

FLOAT32_TINY = torch.finfo(torch.float32).tiny


def check_logits(logits: torch.Tensor) -> None:
    """Raises TypeError unless `logits` is a floating-point tensor."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits must be a tensor; got {type(logits).__name__}")
    check_dtype("the dtype of logits", logits.dtype)


@overload
def gumbel_softmax(
    logits: torch.Tensor,
    tau: float | torch.Tensor = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    seed: int | torch.Tensor | None = None,
    return_kl: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def gumbel_softmax(
    logits: torch.Tensor,
    tau: float | torch.Tensor = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    seed: int | torch.Tensor | None = None,
    return_kl: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def gumbel_softmax(
    logits: torch.Tensor,
    tau: float | torch.Tensor = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    seed: int | torch.Tensor | None = None,
    return_kl: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax((logits + g) / tau) over `dim`, g standard Gumbel noise (Jang et al. 2017; Ramesh et al. 2021, 2.1).

    A drop-in replacement for torch.nn.functional.gumbel_softmax. The noise is a function of the seed and the element's
    index (see `dalle_kernels.philox`): it is never stored, and equal seeds give equal noise on every backend, for all
    strides.

    Args:
        logits: unnormalised log-probabilities, any shape with at least one dimension; float32, bfloat16 or float16
            (float64 on "reference"). -inf excludes a class: its y and its gradient are 0. Any strides; C-contiguous
            logits are read without a copy and, on "cpu", also those with the classes last in memory (channels_last with
            dim 1).
        tau: temperature, > 0; a number, or a tensor of one element. A gradient of tau is computed by "reference".
        hard: return the exact one-hot of the largest noisy logit, with the gradient of the soft y (straight-through).
        eps: ignored; accepted for compatibility.
        dim: the dimension of the classes.
        seed: an int or an int64 tensor of shape [] on the logits' device; None: a new seed from torch's generator.
        return_kl: also return KL(softmax(logits) || uniform) over `dim`, in nats.
        backend: "cuda", "triton", "cpu" or "reference"; None: the first of these that can run the problem.

    Returns:
        y in the logits' shape and dtype, with their strides if they were read without a copy; in float32 where
        torch.autocast computes softmax in it, i.e. not on a CPU. With `return_kl` the pair
        (y, kl): kl is float32 (float64 for float64 logits) in the logits' shape without `dim`. Both are differentiable.
        A row with NaN or +inf, or with -inf only, is NaN, as in torch.softmax.

    Raises:
        ValueError: `dim`, `tau` or `seed` is invalid.
        TypeError: the logits are not a floating-point tensor, or the seed is neither an int nor a tensor.
        NotImplementedError: the backend cannot run the problem, or (except on "reference") double backward, a gradient
            of `tau`, or a forward-mode derivative.
    """
    check_logits(logits)
    if not -logits.ndim <= dim < logits.ndim:
        raise ValueError(f"dim must name one of the logits' {logits.ndim} dimensions; got {dim}")
    if logits.shape[dim] == 0:
        raise ValueError(f"dim {dim} must hold at least one class; the logits have shape {list(logits.shape)}")
    if isinstance(tau, torch.Tensor) and tau.numel() != 1:
        raise ValueError(f"tau must be one number; got a tensor of shape {list(tau.shape)}")
    if not FLOAT32_TINY <= tau < float("inf"):  # NaN fails too; the kernels divide in float32
        raise ValueError(f"tau must be a positive, finite number; got {tau}")
    logits = autocast.softmax(logits)
    seed = fresh_seed((), logits.device) if seed is None else as_seed(seed, "seed", (), logits.device)
    if isinstance(tau, torch.Tensor) and differentiated(tau):
        run, tau = _differentiable_in_tau(logits, backend), tau.reshape(())
    else:
        run, tau = backends.dispatch("gumbel_softmax", logits, backend), float(tau)
    y, kl = run(logits, seed, tau, bool(hard), dim % logits.ndim, bool(return_kl))
    return (y, kl) if return_kl else y


def _differentiable_in_tau(logits, backend):
    chosen = backends.select("gumbel_softmax", logits, backend or backends.forced() or backends.reference.name)
    if chosen is not backends.reference:
        raise NotImplementedError(
            f"backend {chosen.name!r} cannot run gumbel_softmax here: it has no gradient of tau; use 'reference', or "
            "tau.detach()"
        )
    return chosen.operations["gumbel_softmax"]
