"""Training of stage one, the dVAE (Ramesh et al. 2021, App. A.2)."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from dalle import config as configs
from dalle.data import open_source, split
from dalle.data.crops import dvae_crop
from dalle.errors import UserError
from dalle.images import image_grid, save_png
from dalle.metrics import codebook_usage, psnr
from dalle.models.checkpoint import load_dvae, save_part
from dalle.models.dvae import DiscreteVAE, DiscreteVAEConfig, logit_laplace_nll, to_range
from dalle.runtime import OnStep
from dalle.training.init import init_directory
from dalle.training.loader import ImageLoader, images_digest, step_seed
from dalle.training.loop import Result, TrainConfig, checkpoint_path, output_directory, prepare, train
from dalle.training.optimizer import adamw
from dalle.training.schedules import cosine

HELD_OUT = 256  # images per evaluation


@dataclass(frozen=True, kw_only=True)
class PixelConfig(TrainConfig):
    """The options common to the training of a dVAE and of its decoder."""

    data: str = "emoji"
    """Images: emoji, shapes, shapes:N, shapes-simple, or a folder."""
    crops: Literal["published", "center"] = "published"
    """Crops of the images of a folder: random ones as published, without the flip, or the centre square. Emoji and
    shapes are never cropped; evaluations use the centre square."""
    font: str | None = None
    """Colour-emoji font, if the system's is not found."""
    lr: float = 2e-3
    """Initial learning rate (published: 1e-4); decays by a cosine to 1/80 of it. About 5e-3 learns faster, but on
    mostly white images the codebook can collapse to a single code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check(self, "be positive and finite", lr=0 < self.lr < math.inf)


@dataclass(frozen=True, kw_only=True)
class TrainDVAEConfig(PixelConfig):
    """Trains the dVAE on images and writes dvae.json and dvae.safetensors into a model directory."""

    preset: str = "tiny"
    """Model configuration: tiny, small, medium or dalle; it also sets the image size."""
    model: DiscreteVAEConfig | None = None
    """Full model configuration, in place of the preset."""
    beta: float | None = None
    """Weight of the KL term after its warm-up. By default the published 6.6 for codes of 8x8 pixels, scaled by the side
    of a code for others: with 4x4 pixels, larger weights blur and smaller ones leave codes unused."""
    beta_warmup: float = 0.05
    """Fraction of the run over which the weight of the KL term rises from 0."""
    tau_end: float = 1 / 16
    """Final temperature of the relaxation, annealed from 1."""
    tau_fall: float = 0.75
    """Fraction of the run over which the temperature falls."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check(self, "be positive and finite", tau_end=0 < self.tau_end < math.inf)
        configs.check(self, "be at least 0 and finite", beta=self.beta is None or 0 <= self.beta < math.inf)
        configs.check(self, "be in [0, 1]", beta_warmup=0 <= self.beta_warmup <= 1)
        configs.check(self, "be in (0, 1]", tau_fall=0 < self.tau_fall <= 1)


Config = TypeVar("Config", bound=PixelConfig)


class PixelTask(Generic[Config]):
    """The part of a training task that the dVAE and its decoder share; a subclass adds the losses."""

    name: str
    ema_decay = 0.999
    max_grad_norm = math.inf

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, prepare(config)
        # pyrefly: ignore[no-matching-overload]
        self.model = self.initial_model().to(self.device, memory_format=torch.channels_last)
        source = open_source(config.data, self.model.config.image_size, font=config.font)
        training, held_out = split(source, "train"), split(source, "heldout")
        self.skipped = source.skipped
        crop = dvae_crop if config.crops == "published" else None
        self.loader = ImageLoader(training, config.batch_size, config.seed, crop)
        self.held_out = [sample.image for _, sample in held_out.readable(range(min(HELD_OUT, len(held_out))))]
        self.identity = {"images": len(training), "digest of the images": images_digest(training)}
        self.optimizer = adamw(self.model, betas=(0.9, 0.999), weight_decay=1e-4)

    def initial_model(self) -> DiscreteVAE:
        """The model at step 0, on the CPU."""
        raise NotImplementedError

    def learning_rate(self, step: int, fraction: float) -> float:
        return cosine(self.config.lr, self.config.lr / 80, fraction)

    def evaluate(self, model: DiscreteVAE) -> dict[str, float]:
        return evaluate(model, self.held_out) if self.held_out else {}

    def save_samples(self, model: DiscreteVAE, path: Path) -> None:
        """Writes pairs of rows: images, and their reconstructions below them."""
        images = self.held_out[:24] or list(self.loader.batch(0).images[:24])
        decoded = model.reconstruct(torch.stack(images).to(self.device)).cpu()
        rows = [row for i in range(0, len(images), 8) for row in (images[i : i + 8], list(decoded[i : i + 8]))]
        save_png(image_grid(rows, scale=max(1, 64 // self.model.config.image_size)), path)

    def write_model(self, model: nn.Module, done: bool) -> None:
        save_part(self.config.out, "dvae", model)


class DVAETask(PixelTask[TrainDVAEConfig]):
    """The task of the training loop for the dVAE."""

    name = "dvae"

    def initial_model(self) -> DiscreteVAE:
        directory = init_directory(self.config)
        if directory is not None:
            return load_trainable(directory)
        return DiscreteVAE(self.config.model or DiscreteVAEConfig.preset(self.config.preset))

    def losses(self, step: int, fraction: float) -> dict[str, Tensor]:
        config = self.config
        beta = 6.6 * self.model.config.downsampling / 8 if config.beta is None else config.beta
        return self.model.loss(
            self.loader.batch(step).images.to(self.device, non_blocking=True),
            tau=cosine(1.0, config.tau_end, fraction / config.tau_fall),
            beta=cosine(0.0, beta, fraction / config.beta_warmup) if config.beta_warmup else beta,
            seed=step_seed(config.seed, step),
        )


def load_trainable(directory: Path) -> DiscreteVAE:
    """The dVAE of a model directory; UserError if it is a VQGAN."""
    dvae = load_dvae(directory)
    if not isinstance(dvae, DiscreteVAE):
        raise UserError(f"the dVAE of {directory} is a VQGAN, which cannot be trained here: train its prior or CLIP")
    return dvae


@torch.inference_mode()
def evaluate(model: DiscreteVAE, images: list[Tensor]) -> dict[str, float]:
    """Reconstruction of images, uint8 [3, S, S], from argmax codes: nats per value, PSNR in dB, codebook usage."""
    codes, decoded, nll = [], [], []
    device = next(model.parameters()).device
    for batch in torch.stack(images).split(64):
        batch = batch.to(device)
        codes.append(model.codes(batch))
        stats = model.decoder.from_codes(codes[-1]).float()
        nll.append(logit_laplace_nll(to_range(batch / 255), stats).mean((1, 2, 3)))
        decoded.append(model.decode(codes[-1]).cpu())
    used, perplexity = codebook_usage(torch.cat(codes), model.config.vocab)
    return {
        "nll": torch.cat(nll).mean().item(),
        "psnr": psnr(torch.stack(images) / 255, torch.cat(decoded)),
        "codes used": used,
        "code perplexity": perplexity,
    }


def train_dvae(config: TrainDVAEConfig, *, on_step: OnStep | None = None) -> Result:
    """Trains a dVAE; `on_step` receives the progress. Raises UserError for invalid input."""
    if config.resume and (decoder := checkpoint_path(config, "decoder")).exists():
        raise UserError(f"{decoder} holds a later training run, which resuming the dVAE would undo: delete it first")
    with output_directory(config, "dvae", writes=("dvae", "decoder")):
        for later in ("prior.json", "clip.json"):
            if (config.out / later).exists() and not config.resume:
                raise UserError(
                    f"{config.out} holds a model ({later}) of the dVAE, which would be replaced: choose another --out, "
                    f"or delete {later}"
                )
        task = DVAETask(config)
        return replace(train(task, config, task.identity, on_step), skipped=task.skipped)
