"""`dalle demo`: the whole way from pictures to pictures in a few minutes, on a laptop's CPU."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dalle import config as configs
from dalle import images
from dalle.cli.output import picture_path
from dalle.cli.parsing import parse
from dalle.cli.progress import duration, shown
from dalle.data import Source, open_source, split
from dalle.dvae import DiscreteVAE, DiscreteVAEConfig
from dalle.errors import UserError
from dalle.files import writable_directory
from dalle.pipeline import Pipeline
from dalle.prior import PriorConfig
from dalle.training.loop import Result, TrainConfig, run_path
from dalle.training.tokens import TokenizeConfig, tokenize
from dalle.training.train_dvae import TrainDVAEConfig, train_dvae
from dalle.training.train_prior import TrainPriorConfig, train_prior

DVAE_SHARE = 1 / 3  # of the time
CANDIDATES, SEED = 4, 7
SCALE = 3
HEADINGS = {0: "picture", 1: "reconstruction", 2: "drawn from the caption alone"}  # by column
EMOJI = (
    "red heart",
    "grinning face",
    "green apple",
    "strawberry",
    "pizza",
    "penguin",
    "japan",
    "blue book",
)
EMOJI_DATA, SHAPES_DATA = "emoji-simple", "shapes-simple:4000"
SHAPES = (
    "a large red circle at the center",
    "a small blue square at the top left",
    "a large yellow triangle at the bottom center",
    "a large purple cross at the top right",
    "a small black circle at the middle left",
    "a large green square at the bottom right",
    "a small red triangle at the top center",
    "a large blue cross at the middle right",
)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Trains a tiny dVAE and a tiny prior and draws with them; run it again to go on where it was interrupted.

    Writes demo.png: a row for each of eight captions the model was trained on, with the real picture, what is left of
    it after the codes, and pictures drawn from the caption alone.
    """

    out: Path = Path("demo")
    """Directory for the model, its checkpoints and demo.png."""
    minutes: float = 7.5
    """Time for training; a third of it goes to the dVAE, the rest to the prior."""
    data: Literal["emoji", "shapes"] = "emoji"
    """What to train on: emoji (those without a skin tone) or, in any case without a colour-emoji font, drawn shapes."""
    font: str | None = None
    """Colour-emoji font, if the system's is not found."""

    def __post_init__(self):
        configs.check(self, "be positive and finite", minutes=0 < self.minutes < math.inf)


def main(argv: list[str]) -> int:
    config = parse(DemoConfig, "demo", argv)
    began = time.monotonic()
    out = writable_directory(config.out)
    picture = picture_path(out / "demo.png")
    data, captions = choose_data(config)
    dvae_config, prior_config = training(config, data)

    dvae = _train("1/3 dVAE", train_dvae, dvae_config, "dvae")
    if dvae.interrupted:
        return _say_how_to_go_on()
    with shown("2/3 pictures to codes") as on_step:
        tokenize(TokenizeConfig(out=out, data=data, font=config.font), on_step=on_step)
    prior = _train("3/3 prior", train_prior, prior_config, "prior")
    if prior.interrupted:
        return _say_how_to_go_on()

    pipeline = Pipeline.from_pretrained(out)
    real = _find(split(open_source(data, pipeline.dvae.config.image_size, font=config.font), "train"), captions)
    images.save(draw(pipeline, real, captions), picture)
    print(_summary(dvae, prior, pipeline.dvae.config.vocab))
    print(f"{picture} shows it all; {duration(time.monotonic() - began)} in total")
    return 0


def choose_data(config: DemoConfig) -> tuple[str, tuple[str, ...]]:
    """The pictures to train on, and the captions to draw."""
    if config.data == "emoji":
        try:
            open_source(EMOJI_DATA, 32, font=config.font)
            return EMOJI_DATA, EMOJI
        except UserError as error:
            if config.font is not None:
                raise
            print(f"no emoji here, so the demo draws shapes instead: {error}", file=sys.stderr)
    return SHAPES_DATA, SHAPES


def training(config: DemoConfig, data: str) -> tuple[TrainDVAEConfig, TrainPriorConfig]:
    """How the two stages are trained: small batches, and for the prior a narrow model that can learn its pictures by
    heart (a token for every word, always the same), because a minute of a CPU is only a few passes over them.
    """
    common = dict(out=config.out, batch_size=16, threads=fastest_threads(), sample_every=1000, save_every=1000)
    size = replace(PriorConfig.preset("tiny"), text_len=24, text_vocab=2048, heads=4)
    return (
        TrainDVAEConfig(data=data, font=config.font, minutes=config.minutes * DVAE_SHARE, lr=4e-3, **common),
        TrainPriorConfig(model=size, minutes=config.minutes * (1 - DVAE_SHARE), lr=2e-3, bpe_dropout=0.0, **common),
    )


@torch.inference_mode()
def fastest_threads() -> int:
    """One thread or all of them, whichever a small model runs faster with now.

    On two cores that other programs use too, two threads that wait for each other were 60 times slower than one.
    """
    model, pictures = DiscreteVAE(DiscreteVAEConfig.preset("tiny")), torch.zeros(16, 3, 32, 32)
    seconds = {}
    for threads in (torch.get_num_threads(), 1):
        torch.set_num_threads(threads)
        model.reconstruct(pictures)
        began = time.perf_counter()
        for _ in range(3):
            model.reconstruct(pictures)
        seconds[threads] = time.perf_counter() - began
    return min(seconds, key=seconds.get)


def _train(title: str, train: Callable[..., Result], config: TrainConfig, name: str) -> Result:
    """Trains, from the checkpoint of an earlier demo if there is one."""
    with shown(title) as on_step:
        return train(replace(config, resume=run_path(config, name).exists()), on_step=on_step)


def _say_how_to_go_on() -> int:
    print("stopped, and what was learned is saved: run the same command again to go on", file=sys.stderr)
    return 130


def _find(source: Source, captions: tuple[str, ...]) -> list[Tensor]:
    """The first picture of every caption, uint8 [3, S, S]."""
    places = {}
    for i in range(len(source)):
        places.setdefault(source.caption(i), i)
    return [source[places[caption]].image for caption in captions]


def draw(pipeline: Pipeline, real: list[Tensor], captions: tuple[str, ...]) -> Image.Image:
    """A row for every caption: its picture, the picture after the codes, and what the model draws for the caption."""
    rows = []
    for picture, drawings in zip(real, pipeline.generate(captions, candidates=CANDIDATES, seed=SEED), strict=True):
        shown = [pipeline.reconstruct(picture), *(drawing.image for drawing in drawings)]
        rows.append([picture, *map(images.to_tensor, shown)])
    body = images.grid(rows, captions, scale=SCALE)
    font = ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (body.width, body.height + 2 * sum(font.getmetrics())), "white")
    sheet.paste(body, (0, sheet.height - body.height))
    for column, heading in HEADINGS.items():
        place = images.MARGIN + column * (SCALE * real[0].shape[-1] + images.MARGIN), images.MARGIN
        ImageDraw.Draw(sheet).text(place, heading, fill="gray", font=font)
    return sheet


def _summary(dvae: Result, prior: Result, vocab: int) -> str:
    found = {**dvae.metrics, **{f"prior {name}": value for name, value in prior.metrics.items()}}
    return (
        f"dVAE, {dvae.step} steps: PSNR {found['heldout psnr']:.1f} dB in colour and {found['heldout codes used']:.0f} "
        f"of {vocab} codes in use, on held-out pictures\n"
        f"prior, {prior.step} steps: {found['prior heldout text']:.2f} nats per text token and "
        f"{found['prior heldout image']:.2f} per image token, on held-out pictures"
    )
