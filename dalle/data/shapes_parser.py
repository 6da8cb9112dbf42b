"""Parses images of synthetic shapes into scenes: exact on rendered images from 32 px up, robust to a dVAE's blur.

Analysis by synthesis, cell by cell. The mean contrast to white gives the colour, and the contrast along that colour a
soft mask. The result is the (shape, size) whose rendering at the mask's centroid, sharp or blurred, full or faded, fits
the mask best in least squares.
"""

import functools
import itertools

import numpy as np
import torch

from dalle.data.shapes import COLOURS, SHAPES, SIZES, Object, Scene, cell, coverage

MIN_ALPHA = 0.1  # anything fainter counts as noise
MIN_AREA = 0.006  # fraction of the image; the smallest object, a small triangle, covers 0.0145
BLURS = (0.025, 0.047)  # standard deviations, as fractions of the image
MIN_STRENGTH = 0.5  # of a faded object
CENTROIDS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6, "cross": 0.0}  # below the box's centre, in sides

_INKS = 255.0 - np.array(list(COLOURS.values()), dtype=np.float64)  # contrast of each colour to white


def parse(image: torch.Tensor) -> Scene:
    """The scene in an image, uint8 [3, S, S]: the objects in the nine cells, in the grammar or not.

    Raises ValueError for another shape or dtype.
    """
    shape = tuple(image.shape)
    if image.dtype != torch.uint8 or len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
        raise ValueError(f"an image must be uint8 [3, S, S], not {image.dtype} {list(shape)}")
    contrast = 255.0 - image.permute(1, 2, 0).cpu().numpy()
    found = (_read_cell(contrast, row, column) for row, column in itertools.product(range(3), range(3)))
    return Scene(tuple(item for item in found if item))


def compare(scene: Scene, parsed: Scene) -> dict[str, bool]:
    """Compares a parsed image with the scene of its caption: whether each attribute that the caption mentions is right.

    colour, shape, size, position: the sets of values are equal; count: the numbers of objects are equal; relation: two
    objects in the right relation, each with the right colour and shape.
    """
    assert scene.kind, "only scenes of the grammar have captions"
    mentioned = {
        "single": ("colour", "shape", "size", "position"),
        "count": ("colour", "shape", "count"),
        "relation": ("colour", "shape", "relation"),
    }[scene.kind]
    return {name: _attribute(scene, name) == _attribute(parsed, name) for name in mentioned}


def _attribute(scene: Scene, name: str) -> object:
    if name == "count":
        return len(scene.objects)
    if name == "relation":
        return scene.relation, [(item.colour, item.shape) for item in scene.objects]
    return {getattr(item, name) for item in scene.objects}


def _read_cell(contrast: np.ndarray, row: int, column: int) -> Object | None:
    size = len(contrast)
    window = cell(row, column, size)
    inside = contrast[window]
    total = inside.sum((0, 1))
    best = np.argmax(_INKS @ total / np.linalg.norm(_INKS, axis=1))  # nearest direction, which blur and fading keep
    ink = _INKS[best]
    alpha = np.clip(inside @ ink / (ink @ ink), 0.0, 1.0)
    alpha[alpha < MIN_ALPHA] = 0.0
    area = alpha.sum()
    if area < MIN_AREA * size * size:
        return None
    y = (np.arange(window[0].start, window[0].stop) + 0.5) @ alpha.sum(1) / area / size
    x = (np.arange(window[1].start, window[1].stop) + 0.5) @ alpha.sum(0) / area / size

    def misfit(look: tuple[str, str]) -> float:
        side = SIZES[look[1]]
        sharp = coverage(look[0], side, (y - CENTROIDS[look[0]] * side, x), window, size)
        height, width = sharp.shape
        blurred = (_blur(height, sigma * size) @ sharp @ _blur(width, sigma * size) for sigma in BLURS)
        return min(_residual(alpha, candidate) for candidate in (sharp, *blurred))

    shape, side = min(itertools.product(SHAPES, SIZES), key=misfit)
    return Object(row, column, list(COLOURS)[best], shape, side)


def _residual(alpha: np.ndarray, candidate: np.ndarray) -> float:
    """The squared distance between two masks, with the candidate faded to fit best."""
    strength = np.clip((alpha * candidate).sum() / (candidate**2).sum(), MIN_STRENGTH, 1.0)
    return ((alpha - strength * candidate) ** 2).sum()


@functools.cache
def _blur(pixels: int, sigma: float) -> np.ndarray:
    """A Gaussian blur along one axis of a window, as a symmetric matrix [pixels, pixels]."""
    position = np.arange(pixels)
    kernel = np.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
    return kernel / (sigma * np.sqrt(2 * np.pi))
