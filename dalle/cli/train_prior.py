"""`dalle train prior`."""

from dalle.cli.parsing import parse_with_preset
from dalle.cli.training import run
from dalle.prior import PRESETS
from dalle.training.train_prior import TrainPriorConfig, train_prior


def main(argv: list[str]) -> int:
    config = parse_with_preset(TrainPriorConfig, "train prior", argv, PRESETS)
    return run("train prior", argv, train_prior, config)
