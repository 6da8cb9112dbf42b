"""`dalle reconstruct`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from dalle import images
from dalle.cli.input import read_square
from dalle.cli.output import picture_path
from dalle.cli.parsing import parse
from dalle.errors import UserError
from dalle.metrics import codebook_usage, psnr
from dalle.models.checkpoint import load_dvae
from dalle.models.hub import model_directory
from dalle.runtime import choose_device


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Passes pictures through the dVAE of a model and back, and shows them above what is left of them."""

    pictures: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PICTURE [PICTURE ...]", help_behavior_hint="(required)"),
    ]
    """Picture files."""
    model: str | None = None
    """Directory of a trained model, or owner/name on the Hugging Face Hub; by default the one in the package."""
    out: Path = Path("reconstructions.png")
    """The PNG to write."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        if not self.pictures:
            raise UserError("there is no picture to reconstruct: name one or more picture files")


COLUMNS = 8


@torch.inference_mode()
def main(argv: list[str]) -> int:
    config = parse(ReconstructConfig, "reconstruct", argv)
    out = picture_path(config.out)
    device = choose_device(config.device)
    dvae = load_dvae(model_directory(config.model)).to(device)
    originals = [images.to_tensor(read_square(path, dvae.config.image_size)) for path in config.pictures]
    codes = torch.cat([dvae.codes(picture[None].to(device)) for picture in originals])
    copies = torch.cat([dvae.decode(grid[None]) for grid in codes]).cpu()

    rows = []
    for first in range(0, len(originals), COLUMNS):
        rows += [originals[first : first + COLUMNS], list(copies[first : first + COLUMNS])]
    images.save(images.grid(rows, scale=max(1, 128 // dvae.config.image_size)), out)

    for path, original, copy in zip(config.pictures, originals, copies, strict=True):
        print(f"{path}: PSNR {psnr(original / 255, copy):.2f} dB")
    used, _ = codebook_usage(codes, dvae.config.vocab)
    whole = psnr(torch.stack(originals) / 255, copies)
    print(f"all: PSNR {whole:.2f} dB, {used} of {dvae.config.vocab} codes used, pictures in {out}")
    return 0
