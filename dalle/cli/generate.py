"""`dalle generate`."""

import sys
import time
from dataclasses import dataclass
from typing import Annotated

import tyro

from dalle import images
from dalle.cli.drawing import DrawingConfig, open_pipeline, sheet, summary
from dalle.cli.parsing import parse
from dalle.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DrawingConfig):
    """Draws pictures for captions with a trained model."""

    prompts: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="CAPTION [CAPTION ...]", help_behavior_hint="(required)"),
    ]
    """Captions, each in quotes."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError('there is no caption to draw: give one in quotes, as in dalle generate "red heart"')
        super().__post_init__()


def main(argv: list[str]) -> int:
    config = parse(GenerateConfig, "generate", argv)
    pipeline = open_pipeline(config)
    began = time.perf_counter()
    rows = pipeline.generate(config.prompts, **config.options())
    seconds = time.perf_counter() - began
    images.save(sheet([[drawing.image for drawing in row] for row in rows], config.prompts), config.out)
    print(summary(rows, config))
    tokens = len(rows) * config.candidates * pipeline.prior.config.image_len
    print(f"{tokens} image tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s", file=sys.stderr)
    return 0
