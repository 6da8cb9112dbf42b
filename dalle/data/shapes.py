"""Synthetic shapes: a small grammar of scenes, rendered with captions. `shapes_parser` recovers the scene of an image.

A scene has one to three objects on a 3x3 grid. There are three kinds, each with its form of caption:

    single     "a small red circle at the top left"      one object
    count      "three blue squares"                      two or three equal objects in one row
    relation   "a red circle left of a green triangle"   two different objects in one row or one column

Attributes that a caption does not mention are random: the row, the size of counted or related objects, and an offset
of less than one pixel in 32. The training split has every colour and every shape, but none of the combinations in
HELD_OUT, as in ShapeWorld (Kuhnle and Copestake 2017).
"""

import itertools
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dalle.data.source import HELD_OUT_EVERY, Part, Sample, Source, Subset

COLOURS = {
    "red": (222, 40, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 205, 20),
    "purple": (150, 50, 190),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.17, "large": 0.27}  # side of the bounding box, as a fraction of the image
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
HELD_OUT = (
    ("red", "square"), ("green", "circle"), ("blue", "triangle"),
    ("yellow", "cross"), ("purple", "circle"), ("black", "square"),
)  # fmt: skip
SEEN = tuple(pair for pair in itertools.product(COLOURS, SHAPES) if pair not in HELD_OUT)
MAX_OFFSET = 0.02  # as a fraction of the image; the largest object still stays inside its cell
SUBPIXELS = 4  # samples per pixel and axis, for anti-aliasing
DEFAULT_COUNT = 100_000

Kind = Literal["single", "count", "relation"]
Offset = tuple[float, float]


@dataclass(frozen=True, order=True)
class Object:
    """One object; objects sort by their cell, in raster order."""

    row: int
    column: int
    colour: str
    shape: str
    size: str

    @property
    def position(self) -> str:
        if (self.row, self.column) == (1, 1):
            return "center"
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """Objects in raster order. ``kind`` is None for objects outside the grammar, which a parser may find."""

    objects: tuple[Object, ...]

    @property
    def kind(self) -> Kind | None:
        objects = self.objects
        if len(objects) == 1:
            return "single"
        looks = {(o.colour, o.shape, o.size) for o in objects}
        if len(objects) in (2, 3) and len(looks) == 1 and len({o.row for o in objects}) == 1:
            return "count"
        different = len({(o.colour, o.shape) for o in objects}) == 2
        return "relation" if len(objects) == 2 and different and self.relation else None

    @property
    def relation(self) -> str | None:
        """The position of the first of two objects relative to the second, if it is in the grammar."""
        if len(self.objects) != 2:
            return None
        first, second = self.objects
        if first.row == second.row:
            return "left of"
        return "above" if first.column == second.column else None


def caption(scene: Scene) -> str:
    """The caption of a scene; raises ValueError if it is not in the grammar."""
    if scene.kind is None:
        raise ValueError(f"{scene} is not a scene of the grammar")
    first = scene.objects[0]
    if scene.kind == "single":
        return f"a {first.size} {first.colour} {first.shape} at the {first.position}"
    if scene.kind == "count":
        plural = "es" if first.shape.endswith("s") else "s"
        return f"{('two', 'three')[len(scene.objects) - 2]} {first.colour} {first.shape}{plural}"
    second = scene.objects[1]
    return f"a {first.colour} {first.shape} {scene.relation} a {second.colour} {second.shape}"


def all_scenes(kind: Kind) -> list[Scene]:
    """Every scene of one kind: 432 single, 576 count, 39,744 relation."""
    grid = range(3)
    looks = list(itertools.product(COLOURS, SHAPES, SIZES))
    if kind == "single":
        return [Scene((Object(row, column, *look),)) for look in looks for row in grid for column in grid]
    if kind == "count":
        columns = [c for n in (2, 3) for c in itertools.combinations(grid, n)]
        return [Scene(tuple(Object(row, c, *look) for c in cs)) for look in looks for row in grid for cs in columns]
    cells = [((a, b), (a, c)) for a in grid for b, c in itertools.combinations(grid, 2)]
    cells += [(first[::-1], second[::-1]) for first, second in cells]
    return [
        Scene((Object(*first, *one), Object(*second, *other)))
        for one, other in itertools.permutations(looks, 2)
        if one[:2] != other[:2]
        for first, second in cells
    ]


def render(scene: Scene, size: int, offset: Offset = (0.0, 0.0)) -> torch.Tensor:
    """Renders a scene on white, uint8 [3, size, size].

    offset: shift of all objects, down and to the right, as a fraction of the image, at most MAX_OFFSET.
    """
    image = np.full((size, size, 3), 255.0)
    for item in scene.objects:
        centre = ((item.row + 0.5) / 3 + offset[0], (item.column + 0.5) / 3 + offset[1])
        window = cell(item.row, item.column, size)
        alpha = coverage(item.shape, SIZES[item.size], centre, window, size)[..., None]
        image[window] += alpha * (np.array(COLOURS[item.colour], dtype=np.float64) - image[window])
    return torch.from_numpy(np.rint(image).astype(np.uint8)).permute(2, 0, 1).contiguous()


def cell(row: int, column: int, size: int) -> tuple[slice, slice]:
    """The pixels of one cell of the 3x3 grid. From 32 px up, an object covers no pixel outside its own cell."""
    edges = [round(i * size / 3) for i in range(4)]
    return slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1])


def coverage(shape: str, side: float, centre: Offset, window: tuple[slice, slice], size: int) -> np.ndarray:
    """Coverage of each pixel of ``window`` by an object, float64 in [0, 1]; lengths are fractions of the image."""
    y, x = (
        ((np.arange(w.start * SUBPIXELS, w.stop * SUBPIXELS) + 0.5) / (size * SUBPIXELS) - c) * (2 / side)
        for w, c in zip(window, centre, strict=True)
    )
    inside = _inside(shape, abs(x)[None, :], y[:, None])
    return inside.reshape(y.size // SUBPIXELS, SUBPIXELS, x.size // SUBPIXELS, SUBPIXELS).mean((1, 3))


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a shape with bounding box [-1, 1] x [-1, 1]; x is |x|, because all shapes are symmetric."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "triangle":
        return (2 * x <= 1 + y) & (y <= 1)
    y = abs(y)
    if shape == "square":
        return np.maximum(x, y) <= 1
    return (np.maximum(x, y) <= 1) & (np.minimum(x, y) <= 1 / 3)  # a cross, its arms a third wide


def random_scene(rng: random.Random, part: Part, *, simple: bool = False) -> Scene:
    """A random scene of the training split (seen combinations only) or the held-out split (at least one held out)."""
    pairs = HELD_OUT if part == "heldout" else SEEN
    kind = "single" if simple else rng.choice(("single", "count", "relation"))
    look, size = rng.choice(pairs), rng.choice(tuple(SIZES))
    if kind == "single":
        return Scene((Object(rng.randrange(3), rng.randrange(3), *look, size),))
    if kind == "count":
        row, columns = rng.randrange(3), rng.sample(range(3), rng.choice((2, 3)))
        return Scene(tuple(Object(row, column, *look, size) for column in sorted(columns)))
    others = SEEN if part == "train" else HELD_OUT + SEEN
    other = rng.choice([pair for pair in others if pair != look])
    line, (a, b) = rng.randrange(3), rng.sample(range(3), 2)
    cells = ((line, a), (line, b)) if rng.random() < 0.5 else ((a, line), (b, line))
    sizes = size, rng.choice(tuple(SIZES))
    pair = (Object(*c, *l, s) for c, l, s in zip(cells, (look, other), sizes, strict=True))
    return Scene(tuple(sorted(pair)))


class ShapesSource(Source):
    """``count`` rendered scenes. Scene i is a function of i; every twentieth is in the held-out split.

    simple: only scenes of one object, which a small model learns in minutes.
    """

    def __init__(self, image_size: int, count: int | None = None, *, simple: bool = False) -> None:
        self.image_size = image_size
        self._count = DEFAULT_COUNT if count is None else count
        self.simple = simple
        self.skipped = []

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> str:
        return str(range(self._count)[index])

    def scene(self, index: int) -> Scene:
        """The scene of image ``index``."""
        return self._generate(index)[0]

    def captions_of(self, index: int) -> tuple[str]:
        return (caption(self.scene(index)),)

    def load(self, index: int) -> Sample:
        scene, offset = self._generate(index)
        return Sample(render(scene, self.image_size, offset), (caption(scene),), self.key(index))

    def split(self, part: Part) -> "ShapesPart":
        return ShapesPart(self, [i for i in range(self._count) if _part_of(i) == part])

    def _generate(self, index: int) -> tuple[Scene, Offset]:
        index = range(self._count)[index]
        rng = random.Random(f"{'simple' if self.simple else 'mixed'} scene {index}")
        scene = random_scene(rng, _part_of(index), simple=self.simple)
        return scene, (rng.uniform(-MAX_OFFSET, MAX_OFFSET), rng.uniform(-MAX_OFFSET, MAX_OFFSET))


class ShapesPart(Subset[ShapesSource]):
    """One split of a ShapesSource."""

    def scene(self, index: int) -> Scene:
        return self.source.scene(self.indices[index])


def _part_of(index: int) -> Part:
    return "heldout" if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train"
