"""`dalle demo`: what the shipped model can do, in a minute or two on a laptop's CPU."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from dalle import config as configs
from dalle import images
from dalle.cli.output import picture_path
from dalle.cli.parsing import parse
from dalle.cli.progress import duration
from dalle.files import writable_directory
from dalle.generation.pipeline import Pipeline

CANDIDATES = 8
SCALE = 2
CAPTIONS = (
    "red heart",
    "grinning face",
    "red apple",
    "penguin",
    "pizza",
    "sunflower",
    "rocket",
    "woman astronaut medium-dark skin tone",
)  # the model was trained on these,
HELD_OUT = (
    "man firefighter medium-light skin tone",
    "woman cook dark skin tone",
)  # and on these never, but on every word in them
COMPLETED, COMPLETION = CAPTIONS.index("grinning face"), "face with tongue"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draws with the model that ships in the package.

    Writes demo.png: eight pictures for each of eight captions that the model was trained on and of two that it never
    saw, those first that its own CLIP finds best; and the upper half of a picture, completed.
    """

    out: Path = Path("demo")
    """Directory for demo.png."""
    seed: int = 0
    """Of the first candidate; the others have the numbers that follow."""

    def __post_init__(self) -> None:
        configs.check(self, "be in [0, 2^62)", seed=0 <= self.seed < 2**62)


def main(argv: list[str]) -> int:
    config = parse(DemoConfig, "demo", argv)
    picture = picture_path(writable_directory(config.out) / "demo.png")
    began = time.monotonic()
    pipeline = Pipeline.from_pretrained()
    rows, labels = draw(pipeline, config.seed)
    images.save(images.grid([[images.to_tensor(image) for image in row] for row in rows], labels, SCALE), picture)
    count = CANDIDATES * (len(CAPTIONS) + len(HELD_OUT) + 1)
    taken = f"{duration(time.monotonic() - began)} with {torch.get_num_threads()} threads"
    print(f"{picture}: {count} pictures, seeds {config.seed} to {config.seed + CANDIDATES - 1}, in {taken}")
    print('your own: dalle generate "woman teacher dark skin tone" --candidates 16 --top 4')
    return 0


def draw(pipeline: Pipeline, seed: int) -> tuple[list[list[Image.Image]], list[str]]:
    """Rows of pictures and their labels: one for every caption, and one completed from its upper half."""
    sampling = dict(candidates=CANDIDATES, seed=seed)
    drawings = pipeline.generate(CAPTIONS + HELD_OUT, **sampling)
    labels = [*CAPTIONS, *(f"{caption} (never trained on)" for caption in HELD_OUT)]
    upper = drawings[COMPLETED][0]
    half = pipeline.dvae.config.grid // 2
    drawings.append(pipeline.complete(upper.image, prompt=COMPLETION, rows=half, **sampling))
    labels.append(f"the upper half of a {upper.prompt}, completed as: {COMPLETION}")
    return [[drawing.image for drawing in row] for row in drawings], labels
