"""Metrics shared by training and evaluation: reconstruction quality, codebook usage, retrieval."""

import math

import torch
from torch import Tensor


def codebook_usage(codes: Tensor, vocab: int) -> tuple[int, float]:
    """The number of distinct codes in `codes` (int64, any shape), and the perplexity of their distribution."""
    counts = torch.bincount(codes.flatten(), minlength=vocab)
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * frequencies.log()).sum().item()
    return len(frequencies), math.exp(entropy)


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], any shape, from the mean squared error of the batch."""
    mse = (images.float() - reconstructions.float()).square().mean().item()
    return math.inf if mse == 0 else -10 * math.log10(mse)


def retrieval_rank(scores: Tensor, match: Tensor) -> Tensor:
    """The rank, counted from 0, of the best match in every row, int64 [n].

    Ties count against the match, so that constant scores earn nothing.

    Args:
        scores: higher is better, [n, m].
        match: which columns are correct, bool [n, m], at least one per row.
    """
    best = scores.masked_fill(~match, -math.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~match).sum(1)
