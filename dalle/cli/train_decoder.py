"""`dalle train decoder`."""

from dalle.cli.parsing import parse
from dalle.cli.training import run
from dalle.training.train_decoder import TrainDecoderConfig, train_decoder


def main(argv: list[str]) -> int:
    return run("train decoder", argv, train_decoder, parse(TrainDecoderConfig, "train decoder", argv))
