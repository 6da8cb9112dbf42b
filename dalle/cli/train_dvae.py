"""`dalle train dvae`."""

from dalle.cli.parsing import parse_with_preset
from dalle.cli.training import run
from dalle.dvae import PRESETS
from dalle.training.train_dvae import TrainDVAEConfig, train_dvae


def main(argv: list[str]) -> int:
    config = parse_with_preset(TrainDVAEConfig, "train dvae", argv, PRESETS)
    return run("train dvae", argv, train_dvae, config)
