"""Random crops as published (Ramesh et al. 2021, listings in App. A.2 and B.2), without the flip.

Both take the largest square at a random place, scale it by an area filter to a random side t, and take a random crop
of the model's side S from that. They differ in the place of the square and in the range of t, which never exceeds the
short side of the image:

    dVAE    anywhere                       9/8 S to 12/8 S
    prior   within the central quarter     8/8 S to  9/8 S

Images smaller than S are enlarged to S. An S x S image is returned unchanged.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor

from dalle.images import to_pil, to_tensor

Crop = Callable[[Tensor, int, np.random.Generator], Tensor]


def dvae_crop(image: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """A random crop for training a dVAE: uint8 [3, h, w] -> uint8 [3, size, size]."""
    height, width = image.shape[1:]
    side = min(height, width)
    corner = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    return _cut(image, corner, _scaled_side(side, size, (9, 12), rng), size, rng)


def prior_crop(image: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """A random crop for training a prior: uint8 [3, h, w] -> uint8 [3, size, size]."""
    height, width = image.shape[1:]
    side = min(height, width)
    corner = _central(height - side, rng), _central(width - side, rng)
    return _cut(image, corner, _scaled_side(side, size, (8, 9), rng), size, rng)


def reduced(image: Image.Image, size: int) -> Image.Image:
    """The image with its short side reduced to 12/8 of `size`, the most that a crop uses, so that it can be cached."""
    limit, short = _eighths(size, 12), min(image.size)
    if short <= limit:
        return image
    width, height = (max(1, round(side * limit / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def _central(slack: int, rng: np.random.Generator) -> int:
    """A random offset between 3/8 and 5/8 of `slack`, the pixels that the square leaves free."""
    first = 3 * slack // 8
    return int(rng.integers(first, max(first + 1, 5 * slack // 8)))


def _scaled_side(side: int, size: int, eighths: tuple[int, int], rng: np.random.Generator) -> int:
    low, high = (max(size, min(side, _eighths(size, n))) for n in eighths)
    return int(rng.integers(low, high + 1))


def _eighths(size: int, count: int) -> int:
    return round(count * size / 8)


def _cut(image: Tensor, corner: tuple[int, int], scaled: int, size: int, rng: np.random.Generator) -> Tensor:
    """Takes the largest square at `corner`, scales it to the side `scaled`, and takes a random crop of `size`."""
    side, (top, left) = min(image.shape[1:]), corner
    square = to_pil(image[:, top : top + side, left : left + side]).resize((scaled, scaled), Image.Resampling.BOX)
    top, left = rng.integers(scaled - size + 1, size=2).tolist()
    return to_tensor(square.crop((left, top, left + size, top + size)))
