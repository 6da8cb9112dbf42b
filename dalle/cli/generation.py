"""Shared by `dalle generate` and `dalle complete`: options, the grid of images, and the summary."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from dalle import config as configs
from dalle.cli.output import png_path, printable
from dalle.generation.pipeline import GeneratedImage, GenerationOptions, Pipeline
from dalle.images import image_grid, to_tensor
from dalle.runtime import choose_device


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(GenerationOptions):
    """The options of both commands."""

    model: str | None = None
    """Directory of a trained model, or owner/name on the Hugging Face Hub; by default the shipped model."""
    out: Path = Path("grid.png")
    """The PNG to write. Images are sorted by CLIP score, or by seed if the model has no CLIP."""
    candidates: int = 8
    """Images to generate per prompt."""
    seed: int | None = None
    """Seed of candidate 0; candidate i uses seed + i. By default a random one."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check(self, "be in [0, 2^62)", seed=self.seed is None or 0 <= self.seed < 2**62)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `Pipeline.generate` and `Pipeline.complete`, with a seed in any case."""
        seed = random.randrange(2**31) if self.seed is None else self.seed
        return {field.name: getattr(self, field.name) for field in fields(GenerationOptions)} | {"seed": seed}


def open_pipeline(config: GenerationConfig) -> Pipeline:
    """Loads the model. Before that, raises a UserError if the output cannot be written or the device is missing."""
    png_path(config.out)
    choose_device(config.device)
    return Pipeline.from_pretrained(config.model, device=config.device)


def labelled_grid(rows: list[list[Image.Image]], prompts: Sequence[str]) -> Image.Image:
    """The images of every prompt under it, in up to eight columns, enlarged if they are small."""
    columns = min(8, math.ceil(math.sqrt(len(rows[0]))))
    lines, labels = [], []
    for row, prompt in zip(rows, prompts, strict=True):
        for first in range(0, len(row), columns):
            lines.append([to_tensor(image) for image in row[first : first + columns]])
            labels.append(_one_line(prompt) if first == 0 else "")
    return image_grid(lines, labels, scale=max(1, 128 // rows[0][0].width))


def summary(rows: list[list[GeneratedImage]], config: GenerationConfig) -> str:
    """One line per prompt with the seeds and scores of the images kept, then the number of images and their file."""
    lines = [f"{_one_line(row[0].prompt)}: seeds {', '.join(map(_seed_and_score, row))}" for row in rows]
    kept, generated = sum(map(len, rows)), len(rows) * config.candidates
    return "\n".join([*lines, f"{kept if kept == generated else f'{kept} of {generated}'} images in {config.out}"])


def _seed_and_score(image: GeneratedImage) -> str:
    return str(image.seed) if image.score is None else f"{image.seed} ({image.score:.3f})"


def _one_line(prompt: str) -> str:
    return printable(" ".join(prompt.split()))
