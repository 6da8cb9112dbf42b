"""Gumbel-max sampling in plain PyTorch."""

import torch

from ...philox import gumbel, random_bits


def sample_tokens(logits, seed, offset, temperature, top_k, top_p):
    """Tokens int64 [R]; top_k = 0 and top_p = 1 keep everything."""
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    vocabulary = x.shape[1]
    if 0 < top_k < vocabulary:
        x = _keep_from(x, x.topk(top_k).values[:, -1:])
    if top_p < 1.0:
        ordered = x.sort(descending=True).values
        mass = ((ordered.double() - ordered[:, :1]) / temperature).exp().cumsum(-1)
        before = (mass[:, :-1] < top_p * mass[:, -1:]).sum(-1, keepdim=True)
        x = _keep_from(x, ordered.gather(1, before))
    token = torch.arange(vocabulary, device=x.device)
    noise = gumbel(random_bits(seed[:, None], offset[:, None], token), x.dtype)
    top = x.amax(-1, keepdim=True)
    return torch.where(top.isfinite(), (x - top) / temperature + noise, x).argmax(-1)


def _keep_from(x, threshold):
    """x where x >= threshold (ties are kept), -inf elsewhere."""
    return x.masked_fill(x < threshold, -torch.inf)
