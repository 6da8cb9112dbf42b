"""softmax(q k^T * scale, masked) v in plain PyTorch."""

import torch

from ... import autocast


def sparse_attention(q, k, v, pattern, scale):
    """(out, lse) with a dense mask; statistics in float32 (float64 for float64 inputs)."""
    n = q.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask = pattern.dense(0, n)[:, :n].to(q.device)
    with autocast.disabled(q):
        scores = (q.to(wide) @ k.to(wide).transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
        lse = scores.logsumexp(-1)
        out = torch.empty_like(q).copy_((scores - lse[..., None]).exp() @ v.to(wide))
    return out, lse.detach().float()
