"""Sampling tokens from logits."""

from __future__ import annotations

import torch

from . import backends
from .gumbel_softmax import FLOAT32_TINY, check_logits
from .philox import as_seed, fresh_seed


@torch.no_grad()
def sample_tokens(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Samples one token per row from softmax(logits / temperature): the argmax of logits / temperature + Gumbel noise.

    The noise of a row is a function of (seed, offset, token) only (see `dalle_kernels.philox`), so a row's sample does
    not depend on the other rows of the batch.

    Args:
        logits: [R, V]; float32, bfloat16 or float16 (float64 on "reference"). -inf excludes a token.
        temperature: > 0; use top_k=1 for greedy decoding.
        top_k: keep the k most likely tokens and ties with the k-th; None keeps all.
        top_p: of these, keep the smallest set of most likely tokens whose probability reaches top_p (at least one), and
            ties with the last of them; in (0, 1], None keeps all.
        seed: an int for all rows, or an int64 tensor [R] on the logits' device; None: a new seed per row from torch's
            generator.
        offset: an int for all rows (e.g. the step), or an int64 tensor [R]. None: 0, or the row index if one int seed
            is given, so that no two rows share their noise.
        backend: "cuda", "triton", "cpu" or "reference"; None: the first of these that can run the problem.

    Returns:
        Tokens, int64 [R]; not differentiable. A row with NaN gives its first NaN, else a row with +inf its first +inf;
        a row of only -inf gives 0.

    Raises:
        ValueError: `logits` is not [R, V], or another argument is out of range or has the wrong shape.
        TypeError: the logits are not a floating-point tensor, or a seed or offset is neither an int nor a tensor.
        NotImplementedError: the backend cannot run the problem.
    """
    check_logits(logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [R, V] with at least one token; got {list(logits.shape)}")
    if not FLOAT32_TINY <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be a positive, finite number (top_k=1 takes the most likely token); got {temperature}"
        )
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an int of at least 1, or None to keep all tokens; got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], or be None to keep all tokens; got {top_p}")
    rows, device = (logits.shape[0],), logits.device
    if offset is not None:
        offset = as_seed(offset, "offset", rows, device)
    elif seed is None or isinstance(seed, torch.Tensor):
        offset = torch.zeros(rows, dtype=torch.int64, device=device)
    else:
        offset = torch.arange(rows[0], device=device)
    seed = fresh_seed(rows, device) if seed is None else as_seed(seed, "seed", rows, device)
    run = backends.dispatch("sample_tokens", logits, backend)
    keep = min(top_k or 0, logits.shape[1]), 1.0 if top_p is None else float(top_p)
    return run(logits, seed, offset, float(temperature), *keep)
