"""Baselines in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa


class PaddedCache:
    """Replaces dk.DecodeCache with storage for the whole sequence, for every layer and candidate. A step attends to the
    part that is filled or, if `masked`, to the whole storage with the pattern's mask.
    """

    capturable = False

    def __init__(self, patterns, *, prompts, candidates, heads, head_dim, dtype, device=None, start=0, masked=False):
        self.candidates, self.device = candidates, device
        self.masks = [pattern.dense().to(device) for pattern in patterns] if masked else None
        self.token, self.step = patterns[0].text_len + start, torch.tensor(start, device=device)
        shape = 2, len(patterns), prompts * candidates, heads, patterns[0].seq_len, head_dim
        self.keys, self.values = torch.zeros(shape, dtype=dtype, device=device)

    def next_position(self, layer):
        return 0

    def prefill(self, layer, k, v):
        for storage, x in ((self.keys, k), (self.values, v)):
            storage[layer][:, :, : x.shape[2]] = x.repeat_interleave(self.candidates, 0)

    def advance(self):
        self.token += 1
        self.step += 1

    def attend(self, q, k, v, layer):
        """q, k, v [P * C, H, D] of the new token."""
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.token], values[:, :, self.token] = k, v
        seen = slice(self.token + 1) if self.masks is None else slice(None)
        mask = None if self.masks is None else self.masks[layer][self.token, None]
        return sdpa(q[:, :, None], keys[:, :, seen], values[:, :, seen], attn_mask=mask)[:, :, 0]


def uniform_kl(logits, dim):
    """The KL divergence of softmax(logits) from the uniform distribution, in float32."""
    log_p = logits.float().log_softmax(dim)
    return (log_p.exp() * (log_p + math.log(logits.shape[dim]))).sum(dim)
