"""`dalle complete`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image
from torch import Tensor

from dalle.cli.generation import GenerationConfig, labelled_grid, open_pipeline, summary
from dalle.cli.input import read_square
from dalle.cli.parsing import parse
from dalle.errors import UserError
from dalle.generation.pipeline import Pipeline
from dalle.images import save_png, to_pil, to_tensor

GREY = 128  # threshold of a mask, and the fill of the region to regenerate


@dataclass(frozen=True, kw_only=True)
class CompleteConfig(GenerationConfig):
    """Regenerates a part of an image to match a prompt: the rows below the first ones, or the region that a mask marks.

    The output shows the image, the part of its reconstruction that is kept, and the candidates.
    """

    image: Annotated[Path, tyro.conf.Positional]
    """Image file; its centre square is used."""
    prompt: Annotated[str, tyro.conf.Positional]
    """Text that describes the whole image, in quotes."""
    rows: int | None = None
    """Number of rows of codes to keep, from the top."""
    mask: Path | None = None
    """Image file, in place of --rows; white marks the region to regenerate, which must reach the bottom right."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.rows is None) == (self.mask is None):
            raise UserError("it is not clear what to keep of the image: give either --rows or --mask")


def main(argv: list[str]) -> int:
    config = parse(CompleteConfig, "complete", argv)
    pipeline = open_pipeline(config)
    image = read_square(config.image, pipeline.dvae.config.image_size)
    mask = None if config.mask is None else read_mask(config.mask, pipeline.dvae.config.grid)
    mask, codes = pipeline.completion_mask(config.rows, mask), pipeline.codes(image)
    results = pipeline.complete(codes, prompt=config.prompt, mask=mask, **config.options())
    shown = [image, kept_part(pipeline, codes, mask), *(result.image for result in results)]
    save_png(labelled_grid([shown], [config.prompt]), config.out)
    print(summary([results], config))
    return 0


def read_mask(path: Path, side: int) -> Tensor:
    """Reads which codes to regenerate, bool [side, side]: those under the white part of an image file."""
    mask = to_tensor(read_square(path, side)).float().mean(0) >= GREY
    if not mask[-1, -1]:
        raise UserError(
            f"{path} is black at the bottom right, but the region to regenerate must reach that corner: "
            "codes are generated in raster order and cannot condition on later ones"
        )
    return mask


def kept_part(pipeline: Pipeline, codes: Tensor, mask: Tensor) -> Image.Image:
    """The reconstruction of `codes` [rows, columns], with the region to regenerate filled with grey."""
    pixels = pipeline.dvae.config.image_size // len(mask)
    grey = mask.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)
    return to_pil(pipeline.decode(codes[None])[0].masked_fill(grey, GREY))
