"""softmax(q k^T * scale, masked) v in plain PyTorch."""

import torch

from ... import autocast
from ...philox import random_bits


def sparse_attention(q, k, v, pattern, scale, options):
    """(out, lse) with a dense mask; statistics in float32 (float64 for float64 inputs)."""
    n, group = k.shape[2], q.shape[1] // k.shape[1]
    first = n - q.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask, absent = pattern.dense(first, n)[:, :n].to(q.device), None
    if options.text_lengths is not None:
        tokens = torch.arange(n, device=q.device)
        lacking = ((tokens >= options.text_lengths[:, None]) & (tokens < pattern.text_len))[:, None, :, None]
        absent = lacking[:, :, first:]
        mask = (mask & ~lacking.mT) | absent  # absent queries see all, so that no softmax is empty
        q, k, v = q.masked_fill(absent, 0), k.masked_fill(lacking, 0), v.masked_fill(lacking, 0)  # they may hold NaN
    with autocast.disabled(q):
        k, v = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
        scores = (q.to(wide) @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp()
        if options.seed is not None:
            weights = weights * _kept(options, q.shape[1], first, n) / (1 - options.dropout_p)
        out = weights @ v
        if absent is not None:
            out, lse = out.masked_fill(absent, 0), lse.masked_fill(absent[..., 0], float("-inf"))
        out = torch.empty_like(q).copy_(out)
    return out, lse.detach().float()


def _kept(options, heads, first, n):
    """Whether dropout keeps a pair, bool [B, H, queries, keys]: its random bits (see `dalle_kernels.philox`) at the
    sequence's seed, offset head_offset + head and index query * 2^32 + key, of 32 bits, are at least dropout_p * 2^32.
    """
    tokens = torch.arange(n, device=options.seed.device)
    head = torch.arange(heads, device=options.seed.device) + options.head_offset
    index = (tokens[first:, None] << 32) + tokens
    return random_bits(options.seed[:, None, None, None], head[:, None, None], index) >= int(options.dropout_p * 2**32)
