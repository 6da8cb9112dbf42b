"""Proportions with confidence intervals, and structural similarity."""

from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.errors import UserError

WINDOW, SIGMA = 11, 1.5  # width and standard deviation of the Gaussian window, in pixels
C1, C2 = 0.01**2, 0.03**2  # for values in [0, 1]


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images in [0, 1], float [B, 3, H, W], as float64 [B].

    Means, variances and covariance are taken per colour channel under an 11x11 Gaussian window of standard deviation
    1.5; the result is the mean over channels and all windows inside the image. Raises UserError below 11 pixels.
    """
    channels, height, width = images.shape[1:]
    if min(height, width) < WINDOW:
        raise UserError(f"structural similarity needs images of at least {WINDOW} pixels, not {height}x{width}")
    steps = torch.arange(WINDOW, dtype=torch.float64, device=images.device) - WINDOW // 2
    line = torch.exp(-0.5 * (steps / SIGMA) ** 2)
    line = (line / line.sum()).expand(channels, 1, 1, -1)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, line, groups=channels), line.mT, groups=channels)

    x, y = images.double(), others.double()
    mx, my = mean(x), mean(y)
    vx, vy, covariance = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    similarity = (2 * mx * my + C1) * (2 * covariance + C2) / ((mx**2 + my**2 + C1) * (vx + vy + C2))
    return similarity.mean((1, 2, 3))


def wilson(correct: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a binomial proportion (Wilson 1927)."""
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = (correct + z2 / 2) / (count + z2)
    half = (z2 * (correct * (count - correct) / count + z2 / 4)) ** 0.5 / (count + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(correct: float, count: int) -> dict:
    """The proportion of `correct` out of `count` with its 95 % interval, as JSON.

    `correct` may be fractional: a sum of means over several trials for each of `count` captions. The interval is then
    that of one trial each, which is conservative.
    """
    return {"correct": correct, "total": count, "proportion": correct / count, "95 %": wilson(correct, count)}
