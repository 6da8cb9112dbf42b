"""What `dalle generate` and `dalle complete` share: options, the sheet of pictures, and what is said about them."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from dalle import config as configs
from dalle import images
from dalle.cli.output import picture_path
from dalle.generation.pipeline import Drawing, DrawOptions, Pipeline
from dalle.runtime import choose_device


@dataclass(frozen=True, kw_only=True)
class DrawingConfig(DrawOptions):
    """The options of both commands."""

    model: str | None = None
    """Directory of a trained model, or owner/name on the Hugging Face Hub; by default the one in the package."""
    out: Path = Path("grid.png")
    """The PNG to write, the best pictures first if the model has a CLIP, and else in the order of their seeds."""
    candidates: int = 8
    """Pictures for every caption."""
    seed: int | None = None
    """Of the first candidate; the others have the numbers that follow. By default another one every time."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check(self, "be in [0, 2^62)", seed=self.seed is None or 0 <= self.seed < 2**62)

    def options(self) -> dict[str, Any]:
        """What the pipeline takes, with a seed in any case."""
        seed = random.randrange(2**31) if self.seed is None else self.seed
        return {field.name: getattr(self, field.name) for field in fields(DrawOptions)} | {"seed": seed}


def open_pipeline(config: DrawingConfig) -> Pipeline:
    """The model to draw with; a UserError before it is loaded if there is no place for the pictures."""
    picture_path(config.out)
    choose_device(config.device)
    return Pipeline.from_pretrained(config.model, device=config.device)


def sheet(rows: list[list[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """The pictures of every caption under it, in up to eight columns, enlarged if they are small."""
    columns = min(8, math.ceil(math.sqrt(len(rows[0]))))
    lines, labels = [], []
    for row, caption in zip(rows, captions, strict=True):
        for first in range(0, len(row), columns):
            lines.append([images.to_tensor(image) for image in row[first : first + columns]])
            labels.append(_one_line(caption) if first == 0 else "")
    return images.grid(lines, labels, scale=max(1, 128 // rows[0][0].width))


def summary(rows: list[list[Drawing]], config: DrawingConfig) -> str:
    """A line for every caption with the seeds and scores of what was kept, and where it is."""
    lines = [f"{_one_line(row[0].prompt)}: seeds {', '.join(map(_name, row))}" for row in rows]
    kept, drawn = sum(map(len, rows)), len(rows) * config.candidates
    return "\n".join([*lines, f"{kept if kept == drawn else f'{kept} of {drawn}'} pictures in {config.out}"])


def _name(drawing: Drawing) -> str:
    return str(drawing.seed) if drawing.score is None else f"{drawing.seed} ({drawing.score:.3f})"


def _one_line(caption: str) -> str:
    return " ".join(caption.split())
