"""`dalle train dvae`, `dalle train decoder`, `dalle train prior`, `dalle train clip`."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dalle.cli.output import printable
from dalle.cli.parsing import parse, parse_with_preset
from dalle.cli.progress import numbers, shown
from dalle.files import write_text
from dalle.models import clip, dvae, prior
from dalle.training.loop import Result, TrainConfig
from dalle.training.train_clip import TrainCLIPConfig, train_clip
from dalle.training.train_decoder import TrainDecoderConfig, train_decoder
from dalle.training.train_dvae import TrainDVAEConfig, train_dvae
from dalle.training.train_prior import TrainPriorConfig, train_prior

LISTED = 5  # skipped images named on stderr; skipped.txt lists all


class Stage(NamedTuple):
    """A training command: its configuration, its function, and its presets, which a decoder does not have."""

    config: type[TrainConfig]
    train: Callable[..., Result]
    presets: dict[str, Any] | None


STAGES = {
    "dvae": Stage(TrainDVAEConfig, train_dvae, dvae.PRESETS),
    "decoder": Stage(TrainDecoderConfig, train_decoder, None),
    "prior": Stage(TrainPriorConfig, train_prior, prior.PRESETS),
    "clip": Stage(TrainCLIPConfig, train_clip, clip.PRESETS),
}


def main(argv: list[str]) -> int:
    name, *options = argv
    stage, command = STAGES[name], f"train {name}"
    if stage.presets is None:
        config = parse(stage.config, command, options)
    else:
        config = parse_with_preset(stage.config, command, options, stage.presets)
    return run(command, options, stage.train, config)


def run(command: str, argv: list[str], train: Callable[..., Result], config: TrainConfig) -> int:
    """Trains a model, prints the result, and returns the exit code: 0, or 130 after Ctrl-C."""
    with shown(command) as on_step:
        result = train(config, on_step=on_step)
    report_skipped(result.skipped, config.out)
    if result.interrupted:
        again = shlex.join(["dalle", *command.split(), *argv, *(() if config.resume else ("--resume",))])
        print(f"stopped at step {result.step}; a checkpoint is saved. To resume:\n  {again}", file=sys.stderr)
        return 130
    heldout = f"; held-out images: {numbers(result.evaluation)}" if result.evaluation else ""
    print(f"{result.step} steps, model in {config.out}{heldout}")
    return 0


def report_skipped(skipped: list[tuple[str, str]], out: Path) -> None:
    """Prints the number of skipped images and the first few, and lists all of them in `out`/skipped.txt."""
    if not skipped:
        return
    path = Path(out) / "skipped.txt"
    lines = [printable(f"{name}: {reason}") for name, reason in skipped]
    write_text(path, "".join(f"{line}\n" for line in lines))
    print(f"{len(skipped)} files were skipped, all listed in {printable(str(path))}; the first:", file=sys.stderr)
    for line in lines[:LISTED]:
        print(f"  {line}", file=sys.stderr)
