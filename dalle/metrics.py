"""Numbers that training and evaluation share: quality of reconstructions, use of the codes, retrieval."""

import math

import torch
from torch import Tensor


def codebook_usage(codes: Tensor, vocab: int) -> tuple[int, float]:
    """How many codes occur in `codes` (any shape, int64), and the perplexity of their frequencies."""
    counts = torch.bincount(codes.flatten(), minlength=vocab)
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * frequencies.log()).sum().item()
    return len(frequencies), math.exp(entropy)


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], from the error over the whole batch."""
    mse = (images.float() - reconstructions.float()).square().mean().item()
    return math.inf if mse == 0 else -10 * math.log10(mse)


def outranked(scores: Tensor, same: Tensor) -> Tensor:
    """How many wrong columns come before the best right one in every row: `scores` [n, m], `same` bool, to int64 [n].

    Ties count against the right one: it takes no CLIP to rank equal pictures.
    """
    best = scores.masked_fill(~same, -math.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~same).sum(1)
