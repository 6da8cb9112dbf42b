"""`dalle generate`."""

import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from dalle import config as configs
from dalle import images
from dalle.cli.output import picture_path
from dalle.cli.parsing import parse
from dalle.errors import UserError
from dalle.pipeline import Pipeline
from dalle.training.loop import choose_device


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Draws pictures for captions with a trained model."""

    prompts: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="CAPTION [CAPTION ...]", help_behavior_hint="(required)"),
    ]
    """Captions, each in quotes."""
    model: str = "demo"
    """Directory of a trained model, or owner/name on the Hugging Face Hub; by default what `dalle demo` trains."""
    out: Path = Path("grid.png")
    """The PNG to write: for every caption its candidates in the order of their seeds."""
    candidates: int = 8
    """Pictures for every caption."""
    seed: int | None = None
    """Of the first candidate; the others have the numbers that follow. By default another one every time."""
    temperature: float = 1.0
    """Below 1 the likely is made likelier, above 1 less so."""
    top_k: int | None = None
    """Draw every code from the k most likely ones only."""
    top_p: float | None = None
    """Draw every code from the fewest codes that have this probability together."""
    truncate: bool = False
    """Cut captions that are too long for the model instead of refusing them."""
    batch_size: int = 64
    """Pictures at a time; no influence on what is drawn."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def __post_init__(self):
        if not self.prompts:
            raise UserError('there is no caption to draw: give one in quotes, as in dalle generate "red heart"')
        configs.check(self, "be at least 1", candidates=self.candidates >= 1, batch_size=self.batch_size >= 1)
        configs.check(self, "be in [0, 2^62)", seed=self.seed is None or 0 <= self.seed < 2**62)


def main(argv: list[str]) -> int:
    config = parse(GenerateConfig, "generate", argv)
    out = picture_path(config.out)
    choose_device(config.device)
    pipeline = Pipeline.from_pretrained(config.model, device=config.device)
    seed = random.randrange(2**31) if config.seed is None else config.seed
    began = time.perf_counter()
    drawings = pipeline.generate(
        config.prompts,
        candidates=config.candidates,
        seed=seed,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        truncate=config.truncate,
        batch_size=config.batch_size,
    )
    seconds = time.perf_counter() - began
    images.save(sheet([[drawing.image for drawing in row] for row in drawings], config.prompts), out)
    tokens = len(drawings) * config.candidates * pipeline.prior.config.image_len
    print(f"{len(drawings) * config.candidates} pictures, seeds {seed} to {seed + config.candidates - 1}, in {out}")
    print(f"{tokens} image tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s", file=sys.stderr)
    return 0


def sheet(rows: list[list[Image.Image]], captions: tuple[str, ...]) -> Image.Image:
    """The candidates of every caption under it, in up to eight columns, enlarged if they are small."""
    columns = min(8, math.ceil(math.sqrt(len(rows[0]))))
    lines, labels = [], []
    for row, caption in zip(rows, captions, strict=True):
        for first in range(0, len(row), columns):
            lines.append([images.to_tensor(image) for image in row[first : first + columns]])
            labels.append(" ".join(caption.split()) if first == 0 else "")
    return images.grid(lines, labels, scale=max(1, 128 // rows[0][0].width))
