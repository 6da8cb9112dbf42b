"""`dalle reconstruct`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from dalle.cli.input import read_square
from dalle.cli.output import png_path, printable
from dalle.cli.parsing import parse
from dalle.errors import UserError
from dalle.images import image_grid, save_png, to_tensor
from dalle.metrics import codebook_usage, psnr
from dalle.models.checkpoint import load_dvae
from dalle.models.hub import model_directory
from dalle.runtime import choose_device


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Encodes images with the dVAE of a model and decodes them; shows each image above its reconstruction."""

    images: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)"),
    ]
    """Image files; the centre square of each is used."""
    model: str | None = None
    """Directory of a trained model, or owner/name on the Hugging Face Hub; by default the shipped model."""
    out: Path = Path("reconstructions.png")
    """The PNG to write."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        if not self.images:
            raise UserError("there is no image to reconstruct: name one or more image files")


COLUMNS = 8


@torch.inference_mode()
def main(argv: list[str]) -> int:
    config = parse(ReconstructConfig, "reconstruct", argv)
    out = png_path(config.out)
    device = choose_device(config.device)
    dvae = load_dvae(model_directory(config.model)).to(device)
    originals = [to_tensor(read_square(path, dvae.config.image_size)) for path in config.images]
    codes = torch.cat([dvae.codes(image[None].to(device)) for image in originals])
    decoded = torch.cat([dvae.decode(grid[None]) for grid in codes]).cpu()

    rows = []
    for first in range(0, len(originals), COLUMNS):
        rows += [originals[first : first + COLUMNS], list(decoded[first : first + COLUMNS])]
    save_png(image_grid(rows, scale=max(1, 128 // dvae.config.image_size)), out)

    for path, original, reconstruction in zip(config.images, originals, decoded, strict=True):
        print(f"{printable(str(path))}: PSNR {psnr(original / 255, reconstruction):.2f} dB")
    used, _ = codebook_usage(codes, dvae.config.vocab)
    total = psnr(torch.stack(originals) / 255, decoded)
    print(f"all: PSNR {total:.2f} dB, {used} of {dvae.config.vocab} codes used, images in {out}")
    return 0
