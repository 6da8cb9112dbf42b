"""`dalle demo`: images from the shipped model, in a minute or two on a laptop's CPU."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from dalle import config as configs
from dalle.cli.output import png_path
from dalle.cli.parsing import parse
from dalle.cli.progress import duration
from dalle.files import writable_directory
from dalle.generation.pipeline import Pipeline
from dalle.images import image_grid, save_png, to_tensor

CANDIDATES = 8
SCALE = 2
PROMPTS = (
    "red heart",
    "grinning face",
    "red apple",
    "penguin",
    "pizza",
    "sunflower",
    "rocket",
    "woman astronaut medium-dark skin tone",
)  # captions in the training split
HELD_OUT = (
    "man firefighter medium-light skin tone",
    "woman cook dark skin tone",
)  # captions that were held out, although each of their words was trained on
COMPLETED, COMPLETION = PROMPTS.index("grinning face"), "face with tongue"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Generates images with the shipped model.

    Writes demo.png: eight images for each of eight prompts from the training data and two held-out ones, ranked by the
    model's CLIP, and eight completions of the upper half of an image.
    """

    out: Path = Path("demo")
    """Directory for demo.png."""
    seed: int = 0
    """Seed of candidate 0; candidate i uses seed + i."""

    def __post_init__(self) -> None:
        configs.check(self, "be in [0, 2^62)", seed=0 <= self.seed < 2**62)


def main(argv: list[str]) -> int:
    config = parse(DemoConfig, "demo", argv)
    path = png_path(writable_directory(config.out) / "demo.png")
    began = time.monotonic()
    pipeline = Pipeline.from_pretrained()
    rows, labels = generate(pipeline, config.seed)
    save_png(image_grid([[to_tensor(image) for image in row] for row in rows], labels, SCALE), path)
    count = CANDIDATES * (len(PROMPTS) + len(HELD_OUT) + 1)
    taken = f"{duration(time.monotonic() - began)} with {torch.get_num_threads()} threads"
    print(f"{path}: {count} images, seeds {config.seed} to {config.seed + CANDIDATES - 1}, in {taken}")
    print('for your own prompts: dalle generate "woman teacher dark skin tone" --candidates 16 --top 4')
    return 0


def generate(pipeline: Pipeline, seed: int) -> tuple[list[list[Image.Image]], list[str]]:
    """Rows of images and their labels: one row per prompt, then one of completions."""
    sampling = dict(candidates=CANDIDATES, seed=seed)
    results = pipeline.generate(PROMPTS + HELD_OUT, **sampling)
    labels = [*PROMPTS, *(f"{prompt} (held out)" for prompt in HELD_OUT)]
    best = results[COMPLETED][0]
    half = pipeline.dvae.config.grid // 2
    results.append(pipeline.complete(best.image, prompt=COMPLETION, rows=half, **sampling))
    labels.append(f"upper half of: {best.prompt}, completed as: {COMPLETION}")
    return [[result.image for result in row] for row in results], labels
