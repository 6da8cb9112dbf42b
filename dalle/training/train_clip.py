"""CLIP, which ranks what the prior draws (Radford et al. 2021)."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dalle import config as configs
from dalle import images
from dalle.data import Sample, Source, open_source, split
from dalle.data.source import Subset
from dalle.errors import UserError
from dalle.metrics import outranked
from dalle.models.checkpoint import fingerprint, load_dvae, save_part
from dalle.models.clip import CLIP, CLIPConfig
from dalle.models.dvae import DiscreteVAE
from dalle.models.tokens import digest
from dalle.runtime import OnStep
from dalle.tokenizer import Tokenizer
from dalle.training.feed import PictureLoader, choose_caption
from dalle.training.loop import Result, TrainConfig, prepare, train
from dalle.training.optimizer import adamw
from dalle.training.schedules import cosine, warmup

HELD_OUT = 256  # captioned pictures an evaluation looks at
SHOWN, BEST = 8, 6  # captions and pictures of each in a sample grid
SHIFT = 1 / 16  # of the side: how far a picture is moved at most


@dataclass(frozen=True, kw_only=True)
class TrainCLIPConfig(TrainConfig):
    """Trains a CLIP on captioned pictures and writes clip.json and clip.safetensors into a model directory, which must
    hold a dVAE and a tokenizer.
    """

    data: str = "emoji"
    """Captioned pictures: emoji, shapes, shapes:N, shapes-simple, or a folder."""
    font: str | None = None
    """Colour-emoji font, if the system's is not found."""
    preset: str = "tiny"
    """Size of the model: tiny or small."""
    model: CLIPConfig | None = None
    """The model in every detail, in place of the preset. The side of its pictures and its vocabulary are those of the
    dVAE and the tokenizer, whatever is said here."""
    batch_size: int = 128
    """Pictures per update; each is compared with the captions of all others."""
    lr: float = 3e-3
    """Peak of the learning rate (the published one is 5e-4); falls by a cosine to 1/32 of it."""
    warmup: int = 100
    """Updates over which the learning rate rises (the published number is 2000)."""
    weight_decay: float = 0.2
    """Of AdamW, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check(self, "be at least 2, for captions to tell apart", batch_size=self.batch_size >= 2)
        configs.check(self, "be positive and finite", lr=0 < self.lr < math.inf)
        configs.check(self, "be at least 0", warmup=self.warmup >= 0)
        configs.check(self, "be at least 0 and finite", weight_decay=0 <= self.weight_decay < math.inf)


class CLIPTask:
    """Losses, schedules and evaluation of CLIP, for the shared loop."""

    name = "clip"
    max_grad_norm = 1.0
    average_decay = 0.999

    def __init__(self, config: TrainCLIPConfig) -> None:
        self.config, self.device = config, prepare(config, self.name)
        self.dvae = load_dvae(config.out).to(self.device)
        self.tokenizer = _load_tokenizer(config.out)
        side = self.dvae.config.image_size
        wanted = config.model or CLIPConfig.preset(config.preset)
        size = replace(wanted, image_size=side, text_vocab=self.tokenizer.vocab_size)
        source = open_source(config.data, side, font=config.font)
        self.training, held_out = (WithCopies(split(source, part), self.dvae) for part in ("train", "heldout"))
        self.pictures = PictureLoader(self.training, config.batch_size, config.seed)
        self.held_out = _first(held_out, HELD_OUT)
        self.model = CLIP(size).to(self.device, memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
        self.optimizer = adamw(self.model, betas=(0.9, 0.98), weight_decay=config.weight_decay)

    def learning_rate(self, step: int, fraction: float) -> float:
        return warmup(step, self.config.warmup) * cosine(self.config.lr, self.config.lr / 32, fraction)

    def losses(self, step: int, fraction: float) -> dict[str, Tensor]:
        """Every picture of the batch is shown as it is or as the dVAE gives it back, a little aside."""
        config, rng = self.config, np.random.default_rng((self.config.seed, step))
        batch = self.pictures.batch(step)
        pictures, copies = batch.pictures.chunk(2, dim=1)
        as_copy = torch.from_numpy(rng.random(len(pictures)) < 0.5)
        shown = shift(torch.where(as_copy[:, None, None, None], copies, pictures), rng)
        captions = [
            choose_caption(self.training.captions_of(i), config.seed, step, i) for i in batch.indices.tolist()
        ]
        return self.model.loss(shown.to(self.device), self.pack(captions), batch.indices.to(self.device))

    def evaluate(self, model: CLIP) -> dict[str, float]:
        """Retrieval among held-out pictures that went through the dVAE.

        "caption@k" is the share of pictures whose caption is among the k that fit best, "picture@k" the share of
        captions with one of their pictures among the k best.
        """
        if not self.held_out:
            return {}
        captions = [sample.caption for sample in self.held_out]
        fits = model.similarities(torch.stack([sample.image[3:] for sample in self.held_out]), self.pack(captions))
        same = torch.tensor([[a == b for b in captions] for a in captions])
        return {f"caption@{k}": recall(fits, same, k) for k in (1, 5)} | {
            f"picture@{k}": recall(fits.t(), same, k) for k in (1, 5)
        }

    def draw_samples(self, model: CLIP, path: Path) -> None:
        """For a few captions, held-out ones if there are any: the true picture, then those that fit best."""
        samples = self.held_out or _first(self.training, HELD_OUT)
        pictures, captions = [sample.image[3:] for sample in samples], [sample.caption for sample in samples]
        chosen = torch.linspace(0, len(samples) - 1, min(SHOWN, len(samples))).long()
        text = self.pack([captions[i] for i in chosen])
        best = model.similarities(torch.stack(pictures), text).topk(min(BEST, len(samples)), dim=0).indices.t()
        rows = [[pictures[i], *(pictures[j] for j in row)] for i, row in zip(chosen, best, strict=True)]
        scale = max(1, 64 // self.dvae.config.image_size)
        images.save(images.grid(rows, [captions[i] for i in chosen], scale), path)

    def write_model(self, model: nn.Module, done: bool) -> None:
        save_part(self.config.out, "clip", model)

    def pack(self, captions: list[str]) -> Tensor:
        """Captions too long for the model are cut."""
        return self.model.pack_text([self.tokenizer.encode(caption) for caption in captions], truncate=True)


class WithCopies(Subset):
    """A source whose pictures are uint8 [6, S, S]: the picture, and below it what the dVAE makes of it."""

    def __init__(self, source: Source, dvae: DiscreteVAE) -> None:
        super().__init__(source, range(len(source)))
        self.dvae, self.device = dvae, next(dvae.parameters()).device

    @torch.inference_mode()
    def load(self, index: int) -> Sample:
        sample = super().load(index)
        copy = images.to_uint8(self.dvae.reconstruct(sample.image[None].to(self.device))[0])
        return sample._replace(image=torch.cat([sample.image, copy.cpu()]))


def shift(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Each picture [B, 3, S, S] moved aside and up or down by up to S/16 pixels; its edge is repeated."""
    count, size = len(pictures), pictures.shape[-1]
    reach = int(SHIFT * size)
    offsets = torch.from_numpy(rng.integers(-reach, reach, (2, count, 1), endpoint=True))
    rows, columns = (torch.arange(size) + offsets).clamp(0, size - 1)
    which = torch.arange(count)[:, None, None]
    return pictures[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def recall(fits: Tensor, same: Tensor, k: int) -> float:
    """The share of rows of `fits` with a right column, `same`, among the k largest."""
    return (outranked(fits, same) < k).float().mean().item()


def _first(source: Source, count: int) -> list[Sample]:
    """The first `count` samples, less the unreadable ones."""
    return [sample for _, sample in source.readable(range(min(count, len(source))))]


def _load_tokenizer(directory: Path) -> Tokenizer:
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{directory} holds no tokenizer ({path.name} is missing): run `dalle tokenize` first")
    return Tokenizer.load(path)


def train_clip(config: TrainCLIPConfig, *, on_step: OnStep | None = None) -> Result:
    """Trains a CLIP; `on_step` receives Progress. Raises UserError for what the user can mend."""
    task = CLIPTask(config)
    identity = {"dvae, decoder included": fingerprint(task.dvae)}
    identity["captions"] = digest("\n".join(task.training.captions()))
    identity["tokenizer"] = digest((config.out / "tokenizer.json").read_text(encoding="utf-8"))
    return replace(train(task, config, identity, on_step), skipped=task.training.skipped)
