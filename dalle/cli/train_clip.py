"""`dalle train clip`."""

from dalle.cli.parsing import parse_with_preset
from dalle.cli.training import run
from dalle.clip import PRESETS
from dalle.training.train_clip import TrainCLIPConfig, train_clip


def main(argv: list[str]) -> int:
    config = parse_with_preset(TrainCLIPConfig, "train clip", argv, PRESETS)
    return run("train clip", argv, train_clip, config)
