"""Stage one: the dVAE (Ramesh et al. 2021, App. A.2)."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from dalle import config as configs
from dalle import images
from dalle.data import open_source, split
from dalle.data.crops import dvae_crop
from dalle.errors import UserError
from dalle.metrics import codebook_usage, psnr
from dalle.models.checkpoint import save_part
from dalle.models.dvae import DiscreteVAE, DiscreteVAEConfig, logit_laplace_nll, to_range
from dalle.runtime import OnStep
from dalle.training.feed import PictureLoader, step_seed
from dalle.training.loop import Result, TrainConfig, prepare, run_path, train
from dalle.training.optimizer import adamw
from dalle.training.schedules import cosine

HELD_OUT = 256  # pictures an evaluation looks at


@dataclass(frozen=True, kw_only=True)
class PixelConfig(TrainConfig):
    """What trains on pixels can be told."""

    data: str = "emoji"
    """Pictures: emoji, shapes, shapes:N, shapes-simple, or a folder."""
    crops: Literal["published", "center"] = "published"
    """What is seen of a folder's pictures: random squares as published, without the flip, or the centre square. Drawn
    pictures are always seen whole, and evaluations look at the centre."""
    font: str | None = None
    """Colour-emoji font, if the system's is not found."""
    lr: float = 2e-3
    """Learning rate at the start (the published one is 1e-4); falls by a cosine to 1/80 of it. Some 5e-3 learns faster,
    but on pictures that are mostly white it can end with a single code in use."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check(self, "be positive and finite", lr=0 < self.lr < math.inf)


@dataclass(frozen=True, kw_only=True)
class TrainDVAEConfig(PixelConfig):
    """Trains the dVAE on pictures and writes dvae.json and dvae.safetensors into a model directory."""

    preset: str = "tiny"
    """Size of the model: tiny, small, medium or dalle; it sets the side of the pictures."""
    model: DiscreteVAEConfig | None = None
    """The model in every detail, in place of the preset."""
    beta: float | None = None
    """Weight of the KL term after its warm-up. By default the published 6.6 for codes of 8x8 pixels, and in proportion
    to the side for others: with 4x4 pixels a larger weight lost sharpness and a smaller one left codes unused."""
    beta_warmup: float = 0.05
    """Fraction of the training over which the weight of the KL term rises from 0."""
    tau_end: float = 1 / 16
    """Temperature of the relaxation at the end of its fall from 1."""
    tau_fall: float = 0.75
    """Fraction of the training over which the temperature falls."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check(self, "be positive and finite", tau_end=0 < self.tau_end < math.inf)
        configs.check(self, "be at least 0 and finite", beta=self.beta is None or 0 <= self.beta < math.inf)
        configs.check(self, "be in [0, 1]", beta_warmup=0 <= self.beta_warmup <= 1)
        configs.check(self, "be in (0, 1]", tau_fall=0 < self.tau_fall <= 1)


Config = TypeVar("Config", bound=PixelConfig)


class PixelTask(Generic[Config]):
    """The schedule and the evaluation of what trains on pixels; a subclass gives the losses."""

    name: str
    average_decay = 0.999
    max_grad_norm = math.inf

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, prepare(config, self.name)
        self.model = self.start().to(self.device, memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
        source = open_source(config.data, self.model.config.image_size, font=config.font)
        training, held_out = split(source, "train"), split(source, "heldout")
        self.skipped = source.skipped
        crop = dvae_crop if config.crops == "published" else None
        self.pictures = PictureLoader(training, config.batch_size, config.seed, crop)
        self.held_out = [sample.image for _, sample in held_out.readable(range(min(HELD_OUT, len(held_out))))]
        self.count = len(training)
        self.optimizer = adamw(self.model, betas=(0.9, 0.999), weight_decay=1e-4)

    def start(self) -> DiscreteVAE:
        """The model before the first update, on the CPU."""
        raise NotImplementedError

    def learning_rate(self, step: int, fraction: float) -> float:
        return cosine(self.config.lr, self.config.lr / 80, fraction)

    def evaluate(self, model: DiscreteVAE) -> dict[str, float]:
        return evaluate(model, self.held_out) if self.held_out else {}

    def draw_samples(self, model: DiscreteVAE, path: Path) -> None:
        """Pairs of rows: pictures, and below them what is left of them after the codes."""
        shown = self.held_out[:24] or list(self.pictures.batch(0).pictures[:24])
        copies = model.reconstruct(torch.stack(shown).to(self.device)).cpu()
        rows = [row for i in range(0, len(shown), 8) for row in (shown[i : i + 8], list(copies[i : i + 8]))]
        images.save(images.grid(rows, scale=max(1, 64 // self.model.config.image_size)), path)

    def write_model(self, model: nn.Module, done: bool) -> None:
        save_part(self.config.out, "dvae", model)


class DVAETask(PixelTask[TrainDVAEConfig]):
    """Losses, schedules and evaluation of the dVAE, for the shared loop."""

    name = "dvae"

    def start(self) -> DiscreteVAE:
        return DiscreteVAE(self.config.model or DiscreteVAEConfig.preset(self.config.preset))

    def losses(self, step: int, fraction: float) -> dict[str, Tensor]:
        config = self.config
        beta = 6.6 * self.model.config.downsampling / 8 if config.beta is None else config.beta
        return self.model.loss(
            self.pictures.batch(step).pictures.to(self.device, non_blocking=True),
            tau=cosine(1.0, config.tau_end, fraction / config.tau_fall),
            beta=cosine(0.0, beta, fraction / config.beta_warmup) if config.beta_warmup else beta,
            seed=step_seed(config.seed, step),
        )


@torch.inference_mode()
def evaluate(model: DiscreteVAE, pictures: list[Tensor]) -> dict[str, float]:
    """How well codes without noise carry pictures, uint8 [3, S, S]: nats per value, PSNR in dB, codes in use."""
    codes, copies, nll = [], [], []
    device = next(model.parameters()).device
    for batch in torch.stack(pictures).split(64):
        batch = batch.to(device)
        codes.append(model.codes(batch))
        stats = model.decoder.from_codes(codes[-1]).float()
        nll.append(logit_laplace_nll(to_range(batch / 255), stats).mean((1, 2, 3)))
        copies.append(model.decode(codes[-1]).cpu())
    used, perplexity = codebook_usage(torch.cat(codes), model.config.vocab)
    return {
        "nll": torch.cat(nll).mean().item(),
        "psnr": psnr(torch.stack(pictures) / 255, torch.cat(copies)),
        "codes used": used,
        "code perplexity": perplexity,
    }


def train_dvae(config: TrainDVAEConfig, *, on_step: OnStep | None = None) -> Result:
    """Trains a dVAE; `on_step` receives Progress. Raises UserError for what the user can mend."""
    if config.resume and (decoder := run_path(config, "decoder")).exists():
        raise UserError(f"{decoder} is of a later training, which going on with the dVAE would undo: delete it first")
    task = DVAETask(config)
    result = train(task, config, {"pictures": task.count}, on_step)
    return replace(result, skipped=task.skipped)
