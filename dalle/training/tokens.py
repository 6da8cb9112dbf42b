"""Tokenization: encodes the images of a source as codes, once, for the prior (Ramesh et al. 2021, App. B: argmax)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dalle import config as configs
from dalle.data import Sample, Source, open_source, split
from dalle.data.crops import prior_crop
from dalle.errors import UserError
from dalle.files import atomic_write, sole_writer, writable_directory
from dalle.models.checkpoint import fingerprint, load_dvae, save_part
from dalle.models.tokens import PARTS, Tokens, save_tokens
from dalle.models.vqgan import ImageTokenizer
from dalle.runtime import OnStep, Progress, choose_device
from dalle.tokenizer import Tokenizer
from dalle.training.init import init_directory

DEFAULT_VOCAB = 2048


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Encodes captioned images as codes with the dVAE of a model directory, trains the tokenizer on their captions, and
    writes both into the directory.
    """

    out: Path
    """Directory of the model; codes.safetensors, captions.json and tokenizer.json are written into it."""
    init: str | None = None
    """Take dVAE and tokenizer from this model, to train its prior further: a directory, owner/name on the Hugging Face
    Hub, or "shipped". They are copied."""
    data: str = "emoji"
    """Captioned images: emoji, shapes, shapes:N, shapes-simple, or a folder."""
    font: str | None = None
    """Colour-emoji font, if the system's is not found."""
    crops: int = 1
    """Crops per training image: 1 is the centre square, more are random crops as published for the prior. Images of
    the model's size, such as emoji and shapes, have one."""
    text_vocab: int | None = None
    """Number of text tokens of a new tokenizer (published: 16384), by default 2048; fewer if the captions run out of
    pairs to merge. With --init: learn a new tokenizer instead of keeping that of the model."""
    batch_size: int = 64
    """Images per batch."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        """Raises UserError for invalid fields."""
        configs.check(self, "be at least 1", batch_size=self.batch_size >= 1, crops=self.crops >= 1)
        enough = self.text_vocab is None or self.text_vocab >= 256
        configs.check(self, "be at least 256, one for each byte", text_vocab=enough)


def tokenize(config: TokenizeConfig, *, on_step: OnStep | None = None) -> dict[str, Tokens]:
    """Writes and returns the tokens of both splits, "train" and "heldout".

    Raises UserError if the data or the model directory cannot be used, or a trained prior or CLIP there needs another
    tokenizer.
    """
    out = writable_directory(config.out)
    with sole_writer(out, "tokenizer", "captions", "codes", *(() if config.init is None else ("dvae",))):
        return _tokenize(config, out, on_step)


def _tokenize(config: TokenizeConfig, out: Path, on_step: OnStep | None) -> dict[str, Tokens]:
    directory = init_directory(config)
    dvae = load_dvae(directory or out)
    if directory is not None and (out / "dvae.json").exists() and fingerprint(load_dvae(out)) != fingerprint(dvae):
        raise UserError(f"{out} holds another dVAE than {directory}, which would be replaced: choose another --out")
    source = open_source(config.data, dvae.config.image_size, font=config.font)
    if config.text_vocab is None and directory is not None and (directory / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(directory / "tokenizer.json")
    else:
        tokenizer = Tokenizer.train(split(source, "train").captions(), config.text_vocab or DEFAULT_VOCAB)
    _check_tokenizer(out, tokenizer)
    dvae.to(choose_device(config.device))
    began, total, parts = time.monotonic(), len(source), {}
    for part in PARTS:
        done = sum(len(split(source, before)) for before in parts)

        def log(count: int, done: int = done) -> None:
            if on_step:
                fraction, seconds = (done + count) / total, time.monotonic() - began
                left = seconds / fraction * (1 - fraction)
                on_step(Progress(done + count, fraction, {}, (done + count) / seconds, left))

        crops = config.crops if part == "train" else 1
        parts[part] = _tokenize_part(dvae, split(source, part), crops, config.batch_size, log)

    if directory is not None:
        save_part(out, "dvae", dvae)
    with atomic_write(out / "tokenizer.json") as temporary:
        tokenizer.save(temporary)
    save_tokens(out, dvae, parts, config.data)
    return parts


def _check_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError if a model in the directory was trained with another tokenizer, which would be replaced."""
    models = [name for name in ("prior.json", "clip.json") if (directory / name).exists()]
    path = directory / "tokenizer.json"
    if models and path.exists() and Tokenizer.load(path) != tokenizer:
        raise UserError(
            f"{directory} holds a model of other captions ({models[0]}), whose tokenizer would be replaced: "
            "choose another --out, with a copy of dvae.json and dvae.safetensors"
        )


@torch.inference_mode()
def _tokenize_part(
    dvae: ImageTokenizer, source: Source, crops: int, batch_size: int, log: Callable[[int], None]
) -> Tokens:
    device = next(dvae.parameters()).device
    codes = [torch.empty(0, dvae.config.grid, dvae.config.grid, dtype=torch.int64)]
    captions, keys = [], []
    for first in range(0, len(source), batch_size):
        last = min(first + batch_size, len(source))
        read = source.readable(range(first, last), whole=crops > 1)
        samples = [crop for i, sample in read for crop in _crops(sample, i, crops, dvae.config.image_size)]
        if not samples:
            continue
        batches = torch.stack([sample.image for sample in samples]).split(batch_size)
        codes += [dvae.codes(batch.to(device)).cpu() for batch in batches]
        captions += [list(sample.captions) for sample in samples]
        keys += [sample.key for sample in samples]
        log(last)
    return Tokens(torch.cat(codes), captions, keys, source.skipped)


def _crops(sample: Sample, index: int, crops: int, size: int) -> list[Sample]:
    """The crops of image `index`; `sample` has the whole image if `crops` is above 1."""
    if crops == 1:
        return [sample]
    generators = [np.random.default_rng((n, index)) for n in range(crops if max(sample.image.shape) > size else 1)]
    return [sample._replace(image=prior_crop(sample.image, size, rng)) for rng in generators]
