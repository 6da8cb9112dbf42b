"""softmax((logits + Gumbel noise) / tau) and KL(softmax(logits) || uniform) in plain PyTorch."""

import math

import torch

from ...philox import gumbel_noise


def gumbel_softmax(logits, seed, tau, hard, dim, return_kl):
    """(y, kl or None); statistics and noise in float32 (float64 for float64 inputs)."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = logits.to(wide)
    noisy = x + gumbel_noise(logits.shape, seed, wide)
    y = (noisy / tau).softmax(dim)
    if hard:  # y - y.detach() adds the soft gradient to exact zeros and ones (and keeps NaN visible)
        one_hot = torch.zeros_like(y).scatter_(dim, noisy.argmax(dim, keepdim=True), 1.0)
        y = one_hot + (y - y.detach())
    return y.to(logits.dtype), _kl_to_uniform(x, dim) if return_kl else None


def _kl_to_uniform(x, dim):
    """sum p (log p + log V) with p = softmax(x); 0 log 0 = 0."""
    log_p = x.log_softmax(dim)
    return (log_p.exp() * (log_p.masked_fill(x == -torch.inf, 0.0) + math.log(x.shape[dim]))).sum(dim)
