"""`dalle convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dalle.cli.output import printable
from dalle.cli.parsing import parse
from dalle.conversion.convert import convert


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Converts the weights of another project to a model directory, without running code from their files."""

    kind: Annotated[Literal["openai-dvae", "rudalle", "mindalle"], tyro.conf.Positional]
    """Whose weights: openai-dvae (encoder.pkl and decoder.pkl, a dVAE alone), rudalle (pytorch_model*.bin of version 2
    or 3, vqgan*.ckpt and bpe.model) or mindalle (the unpacked archive)."""
    path: Annotated[Path, tyro.conf.Positional]
    """Directory of the files, under their original names."""
    out: Path
    """Directory to write; it must not hold another model."""


def main(argv: list[str]) -> int:
    config = parse(ConvertConfig, "convert", argv)
    convert(config.kind, config.path, config.out)
    size = sum(path.stat().st_size for path in config.out.glob("*.safetensors"))
    print(f"{printable(str(config.out))}: {size / 1e6:.1f} MB of weights")
    return 0
