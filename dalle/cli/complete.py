"""`dalle complete`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image
from torch import Tensor

from dalle import images
from dalle.cli.drawing import DrawingConfig, open_pipeline, sheet, summary
from dalle.cli.input import read_square
from dalle.cli.parsing import parse
from dalle.errors import UserError
from dalle.generation.pipeline import Pipeline

GREY = 128  # what is drawn anew, where the given picture is shown


@dataclass(frozen=True, kw_only=True)
class CompleteConfig(DrawingConfig):
    """Draws a part of a picture anew: the rows below the first ones, or what a mask marks, as a caption says.

    Shows the picture, what is kept of it after the codes, and the candidates.
    """

    picture: Annotated[Path, tyro.conf.Positional]
    """Picture file; its centre square is taken."""
    caption: Annotated[str, tyro.conf.Positional]
    """Of the whole picture, in quotes."""
    rows: int | None = None
    """How many rows of codes to keep, from the top."""
    mask: Path | None = None
    """In place of rows a picture as large as the other one: white is drawn anew, the bottom right corner included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.rows is None) == (self.mask is None):
            raise UserError("say what to keep of the picture: give either --rows or --mask")


def main(argv: list[str]) -> int:
    config = parse(CompleteConfig, "complete", argv)
    pipeline = open_pipeline(config)
    picture = read_square(config.picture, pipeline.dvae.config.image_size)
    mask = None if config.mask is None else read_mask(config.mask, pipeline.dvae.config.grid)
    region, codes = pipeline.region(config.rows, mask), pipeline.codes(picture)
    drawings = pipeline.complete(codes, prompt=config.caption, mask=region, **config.options())
    shown = [picture, kept(pipeline, codes, region), *(drawing.image for drawing in drawings)]
    images.save(sheet([shown], [config.caption]), config.out)
    print(summary([drawings], config))
    return 0


def read_mask(path: Path, side: int) -> Tensor:
    """Which codes to draw anew, bool [side, side]: those whose part of the mask is rather white than black."""
    mask = images.to_tensor(read_square(path, side)).float().mean(0) >= GREY
    if not mask[-1, -1]:
        raise UserError(
            f"{path} is black at the bottom right, but what is drawn anew must reach that corner: "
            "codes are drawn in reading order and cannot heed what comes after them"
        )
    return mask


def kept(pipeline: Pipeline, codes: Tensor, region: Tensor) -> Image.Image:
    """The picture of `codes` with grey over the region to draw anew."""
    pixels = pipeline.dvae.config.image_size // len(region)
    grey = region.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)
    return images.to_pil(pipeline.decode(codes[None])[0].masked_fill(grey, GREY))
