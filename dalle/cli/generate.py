"""`dalle generate`."""

import sys
import time
from dataclasses import dataclass
from typing import Annotated

import tyro

from dalle.cli.generation import GenerationConfig, labelled_grid, open_pipeline, summary
from dalle.cli.parsing import parse
from dalle.errors import UserError
from dalle.images import save_png


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(GenerationConfig):
    """Generates images from prompts with a trained model."""

    prompts: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PROMPT [PROMPT ...]", help_behavior_hint="(required)"),
    ]
    """Prompts, each in quotes."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError('there is no prompt: give one in quotes, as in dalle generate "red heart"')
        super().__post_init__()


def main(argv: list[str]) -> int:
    config = parse(GenerateConfig, "generate", argv)
    pipeline = open_pipeline(config)
    began = time.perf_counter()
    rows = pipeline.generate(config.prompts, **config.options())
    seconds = time.perf_counter() - began
    save_png(labelled_grid([[result.image for result in row] for row in rows], config.prompts), config.out)
    print(summary(rows, config))
    tokens = len(rows) * config.candidates * pipeline.prior.config.image_len
    print(f"{tokens} image tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s", file=sys.stderr)
    return 0
