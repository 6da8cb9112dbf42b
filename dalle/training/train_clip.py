"""Training of CLIP, which ranks generated images (Radford et al. 2021)."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dalle import config as configs
from dalle.data import Sample, Source, open_source, split
from dalle.data.source import Subset
from dalle.errors import UserError
from dalle.files import digest
from dalle.images import image_grid, save_png, to_uint8
from dalle.metrics import retrieval_rank
from dalle.models.checkpoint import fingerprint, load_dvae, made_with, save_part
from dalle.models.clip import CLIP, CLIPConfig
from dalle.models.vqgan import ImageTokenizer
from dalle.runtime import OnStep
from dalle.tokenizer import Tokenizer
from dalle.training.init import init_directory, initial_clip
from dalle.training.loader import ImageLoader, choose_caption, images_digest
from dalle.training.loop import Result, TrainConfig, output_directory, prepare, train
from dalle.training.optimizer import adamw
from dalle.training.schedules import cosine, warmup

HELD_OUT = 256  # captioned images per evaluation
SHOWN, BEST = 8, 6  # captions in a sample grid, and images per caption
SHIFT = 1 / 16  # maximum shift of an image, as a fraction of its side


@dataclass(frozen=True, kw_only=True)
class TrainCLIPConfig(TrainConfig):
    """Trains a CLIP on captioned images and writes clip.json and clip.safetensors into a model directory, which must
    hold a dVAE and a tokenizer.
    """

    data: str = "emoji"
    """Captioned images: emoji, shapes, shapes:N, shapes-simple, or a folder."""
    font: str | None = None
    """Colour-emoji font, if the system's is not found."""
    preset: str = "tiny"
    """Model configuration: tiny or small."""
    model: CLIPConfig | None = None
    """Full model configuration, in place of the preset. Image size and vocabulary always follow the dVAE and the
    tokenizer."""
    new_tokenizer: bool = False
    """With --init: the tokenizer is not that of the model, so that its text embeddings start anew."""
    batch_size: int = 128
    """Images per step; each is contrasted with the captions of all others."""
    lr: float = 3e-3
    """Peak learning rate (published: 5e-4); decays by a cosine to 1/32 of it."""
    warmup: int = 100
    """Steps of linear learning-rate warm-up (published: 2000)."""
    weight_decay: float = 0.2
    """Weight decay of AdamW, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check(self, "be at least 2 for a contrastive loss", batch_size=self.batch_size >= 2)
        configs.check(self, "be positive and finite", lr=0 < self.lr < math.inf)
        configs.check(self, "be at least 0", warmup=self.warmup >= 0)
        configs.check(self, "be at least 0 and finite", weight_decay=0 <= self.weight_decay < math.inf)


class CLIPTask:
    """The task of the training loop for CLIP."""

    name = "clip"
    max_grad_norm = 1.0
    ema_decay = 0.999

    def __init__(self, config: TrainCLIPConfig) -> None:
        self.config, self.device = config, prepare(config)
        self.dvae = load_dvae(config.out).to(self.device)
        self.tokenizer = _load_tokenizer(config.out)
        self.made_with = made_with(config.out, self.dvae)
        source = open_source(config.data, self.dvae.config.image_size, font=config.font)
        self.training, held_out = (WithReconstructions(split(source, part), self.dvae) for part in ("train", "heldout"))
        self.loader = ImageLoader(self.training, config.batch_size, config.seed)
        self.held_out = _first(held_out, HELD_OUT)
        # pyrefly: ignore[no-matching-overload]
        self.model = self.initial_model().to(self.device, memory_format=torch.channels_last)
        self.optimizer = adamw(self.model, betas=(0.9, 0.98), weight_decay=config.weight_decay)

    def initial_model(self) -> CLIP:
        """The model at step 0, on the CPU."""
        config, directory, side = self.config, init_directory(self.config), self.dvae.config.image_size
        if directory is not None:
            return initial_clip(directory, self.made_with, self.tokenizer, side, config)
        model_config = config.model or CLIPConfig.preset(config.preset)
        return CLIP(replace(model_config, image_size=side, text_vocab=self.tokenizer.vocab_size))

    def learning_rate(self, step: int, fraction: float) -> float:
        return warmup(step, self.config.warmup) * cosine(self.config.lr, self.config.lr / 32, fraction)

    def losses(self, step: int, fraction: float) -> dict[str, Tensor]:
        """The loss on the images of a batch, each replaced by its reconstruction with probability 1/2, and shifted."""
        config, rng = self.config, np.random.default_rng((self.config.seed, step))
        batch = self.loader.batch(step)
        originals, reconstructions = batch.images.chunk(2, dim=1)
        reconstructed = torch.from_numpy(rng.random(len(originals)) < 0.5)
        images = shift(torch.where(reconstructed[:, None, None, None], reconstructions, originals), rng)
        captions = [
            choose_caption(self.training.captions_of(i), config.seed, step, i) for i in batch.indices.tolist()
        ]
        return self.model.loss(images.to(self.device), self.pack(captions), batch.indices.to(self.device))

    def evaluate(self, model: CLIP) -> dict[str, float]:
        """Retrieval recall among reconstructions of held-out images.

        "image-to-text R@k" is the fraction of images whose caption is among the k best, "text-to-image R@k" the
        fraction of captions with one of their images among the k best.
        """
        if not self.held_out:
            return {}
        captions = [sample.caption for sample in self.held_out]
        scores = model.similarities(torch.stack([sample.image[3:] for sample in self.held_out]), self.pack(captions))
        match = torch.tensor([[a == b for b in captions] for a in captions])
        return {f"image-to-text R@{k}": recall(scores, match, k) for k in (1, 5)} | {
            f"text-to-image R@{k}": recall(scores.t(), match, k) for k in (1, 5)
        }

    def save_samples(self, model: CLIP, path: Path) -> None:
        """Writes one row per caption, held-out ones if there are any: its own image, then the best matches."""
        samples = self.held_out or _first(self.training, HELD_OUT)
        images, captions = [sample.image[3:] for sample in samples], [sample.caption for sample in samples]
        chosen = torch.linspace(0, len(samples) - 1, min(SHOWN, len(samples))).long()
        text = self.pack([captions[i] for i in chosen])
        best = model.similarities(torch.stack(images), text).topk(min(BEST, len(samples)), dim=0).indices.t()
        rows = [[images[i], *(images[j] for j in row)] for i, row in zip(chosen, best, strict=True)]
        scale = max(1, 64 // self.dvae.config.image_size)
        save_png(image_grid(rows, [captions[i] for i in chosen], scale), path)

    def write_model(self, model: nn.Module, done: bool) -> None:
        save_part(self.config.out, "clip", model, self.made_with)

    def pack(self, captions: list[str]) -> Tensor:
        """Token ids of captions for the model, int64 [B, text_len]; too long captions are truncated."""
        return self.model.pack_text([self.tokenizer.encode(caption) for caption in captions], truncate=True)


class WithReconstructions(Subset):
    """A source with images of six channels, uint8 [6, S, S]: the image, then the dVAE's reconstruction of it."""

    def __init__(self, source: Source, dvae: ImageTokenizer) -> None:
        super().__init__(source, range(len(source)))
        self.dvae, self.device = dvae, next(dvae.parameters()).device

    @torch.inference_mode()
    def load(self, index: int) -> Sample:
        sample = super().load(index)
        reconstruction = to_uint8(self.dvae.reconstruct(sample.image[None].to(self.device))[0])
        return sample._replace(image=torch.cat([sample.image, reconstruction.cpu()]))


def shift(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Shifts each image [B, 3, S, S] at random, by up to S/16 pixels per axis, with edge padding."""
    count, size = len(images), images.shape[-1]
    reach = int(SHIFT * size)
    offsets = torch.from_numpy(rng.integers(-reach, reach, (2, count, 1), endpoint=True))
    rows, columns = (torch.arange(size) + offsets).clamp(0, size - 1)
    batch = torch.arange(count)[:, None, None]
    return images[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def recall(scores: Tensor, match: Tensor, k: int) -> float:
    """Recall at k: the fraction of rows of `scores` [n, m] with a `match`, bool [n, m], among the k largest."""
    return (retrieval_rank(scores, match) < k).float().mean().item()


def _first(source: Source, count: int) -> list[Sample]:
    """The readable ones of the first `count` samples."""
    return [sample for _, sample in source.readable(range(min(count, len(source))))]


def _load_tokenizer(directory: Path) -> Tokenizer:
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{directory} holds no tokenizer ({path.name} is missing): run `dalle tokenize` first")
    return Tokenizer.load(path)


def train_clip(config: TrainCLIPConfig, *, on_step: OnStep | None = None) -> Result:
    """Trains a CLIP; `on_step` receives the progress. Raises UserError for invalid input."""
    with output_directory(config, "clip"):
        task = CLIPTask(config)
        identity = {"dvae, decoder included": fingerprint(task.dvae), "tokenizer": task.made_with["tokenizer"]}
        identity["captions"] = digest("\n".join(task.training.captions()))
        identity["digest of the images"] = images_digest(task.training)
        return replace(train(task, config, identity, on_step), skipped=task.training.skipped)
