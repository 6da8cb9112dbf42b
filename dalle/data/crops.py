"""Random squares of a picture as published (Ramesh et al. 2021, listings in App. A.2 and B.2), without the flip.

Both cut a square as large as the picture allows, scale it by an area filter to a side t somewhat above the model's, and
cut the model's square out of that at random. They differ in where the first square lies and in t; in eighths of the
model's side S, and never above the picture's own short side:

    dVAE    anywhere                       9/8 S to 12/8 S
    prior   within the central quarter     8/8 S to  9/8 S

A picture that is smaller than the model is enlarged to it, and a square of the model's side comes out unchanged.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor

from dalle.images import to_pil, to_tensor

Crop = Callable[[Tensor, int, np.random.Generator], Tensor]


def dvae_crop(picture: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """A square for the training of a dVAE: uint8 [3, h, w] -> uint8 [3, size, size]."""
    height, width = picture.shape[1:]
    side = min(height, width)
    corner = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    return _cut(picture, corner, _scaled_side(side, size, (9, 12), rng), size, rng)


def prior_crop(picture: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """A square for the training of a prior: uint8 [3, h, w] -> uint8 [3, size, size]."""
    height, width = picture.shape[1:]
    side = min(height, width)
    corner = _central(height - side, rng), _central(width - side, rng)
    return _cut(picture, corner, _scaled_side(side, size, (8, 9), rng), size, rng)


def reduced(image: Image.Image, size: int) -> Image.Image:
    """The image with its short side at most 12/8 of `size`: all that a crop needs, and small enough to keep."""
    limit, short = _eighths(size, 12), min(image.size)
    if short <= limit:
        return image
    width, height = (max(1, round(side * limit / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def _central(slack: int, rng: np.random.Generator) -> int:
    """An offset between 3/8 and 5/8 of what the square leaves free."""
    first = 3 * slack // 8
    return int(rng.integers(first, max(first + 1, 5 * slack // 8)))


def _scaled_side(side: int, size: int, eighths: tuple[int, int], rng: np.random.Generator) -> int:
    low, high = (max(size, min(side, _eighths(size, n))) for n in eighths)
    return int(rng.integers(low, high + 1))


def _eighths(size: int, count: int) -> int:
    return round(count * size / 8)


def _cut(picture: Tensor, corner: tuple[int, int], scaled: int, size: int, rng: np.random.Generator) -> Tensor:
    """The largest square at `corner`, scaled to the side `scaled`, and a random square of `size` of that."""
    side, (top, left) = min(picture.shape[1:]), corner
    image = to_pil(picture[:, top : top + side, left : left + side]).resize((scaled, scaled), Image.Resampling.BOX)
    top, left = rng.integers(scaled - size + 1, size=2).tolist()
    return to_tensor(image.crop((left, top, left + size, top + size)))
