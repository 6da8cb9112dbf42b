"""Training of stage two, the prior (Ramesh et al. 2021, App. B.2)."""

import math
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle import config as configs
from dalle.files import digest
from dalle.generation.sampler import generate_codes
from dalle.images import image_grid, save_png
from dalle.models.checkpoint import load_dvae, made_with, save_part
from dalle.models.prior import Prior, PriorConfig
from dalle.models.tokens import Tokens, load_tokens
from dalle.runtime import OnStep
from dalle.tokenizer import Tokenizer
from dalle.training.init import init_directory, initial_prior
from dalle.training.loader import batch_indices, choose_caption, drops_caption, step_seed
from dalle.training.loop import Result, TrainConfig, output_directory, prepare, train
from dalle.training.optimizer import adamw
from dalle.training.schedules import cosine, warmup

HELD_OUT = 256  # captioned images per evaluation
SHOWN, CANDIDATES = 8, 6  # captions in a sample grid, and generated images per caption


@dataclass(frozen=True, kw_only=True)
class TrainPriorConfig(TrainConfig):
    """Trains the prior on the codes in a model directory and writes prior.json and prior.safetensors."""

    preset: str = "tiny"
    """Model configuration: tiny, small, medium, dalle-2.8b, dalle-5.6b or dalle-12b."""
    model: PriorConfig | None = None
    """Full model configuration, in place of the preset. Grid and vocabularies always follow the dVAE and the
    tokenizer."""
    lr: float = 1e-3
    """Peak learning rate (published: 4.5e-4); decays by a cosine to 1/32 of it."""
    warmup: int = 100
    """Steps of linear learning-rate warm-up (published: 5000)."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights (published: 0.99, updated every 25 steps)."""
    new_tokenizer: bool = False
    """With --init: the tokenizer is not that of the model, so that its text embeddings and text head start anew."""
    bpe_dropout: float = 0.1
    """Probability of skipping a merge of the tokenizer in training (BPE dropout)."""
    caption_dropout: float = 0.0
    """Probability of training on an image without its caption, which classifier-free guidance needs: 0.1 for models
    that will be used with --guidance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check(self, "be positive and finite", lr=0 < self.lr < math.inf)
        configs.check(self, "be at least 0", warmup=self.warmup >= 0)
        configs.check(self, "be in [0, 1)", ema_decay=0 <= self.ema_decay < 1)
        configs.check(self, "be in [0, 1]", bpe_dropout=0 <= self.bpe_dropout <= 1)
        configs.check(self, "be in [0, 1]", caption_dropout=0 <= self.caption_dropout <= 1)


class PriorTask:
    """The task of the training loop for the prior."""

    name = "prior"
    max_grad_norm = 4.0

    def __init__(self, config: TrainPriorConfig) -> None:
        self.config, self.device = config, prepare(config)
        self.ema_decay = config.ema_decay
        self.dvae = load_dvae(config.out).to(self.device)
        tokens = load_tokens(config.out, self.dvae)
        self.training, self.held_out = tokens["train"], tokens["heldout"]
        self.tokenizer = Tokenizer.load(config.out / "tokenizer.json")
        self.made_with = made_with(config.out, self.dvae)
        self.model = self.initial_model().to(self.device)
        self.optimizer = adamw(self.model, betas=(0.9, 0.96), weight_decay=4.5e-2)

    def initial_model(self) -> Prior:
        """The model at step 0, on the CPU."""
        config, directory = self.config, init_directory(self.config)
        if directory is not None:
            return initial_prior(directory, self.made_with, self.tokenizer, config)
        rows, columns = self.training.codes.shape[1:]
        return Prior(
            replace(
                config.model or PriorConfig.preset(config.preset),
                grid=(rows, columns),
                image_vocab=self.dvae.config.vocab,
                text_vocab=self.tokenizer.vocab_size,
            )
        )

    def learning_rate(self, step: int, fraction: float) -> float:
        return warmup(step, self.config.warmup) * cosine(self.config.lr, self.config.lr / 32, fraction)

    def losses(self, step: int, fraction: float) -> dict[str, Tensor]:
        config = self.config
        indices = batch_indices(len(self.training.captions), config.batch_size, config.seed, step)
        captions = [self._caption(step, i) for i in indices.tolist()]
        return self.model.loss(self.pack(captions), self.training.codes[indices].flatten(1).to(self.device))

    def _caption(self, step: int, index: int) -> list[int]:
        """Token ids of a caption of image `index` in step `step`; none if the caption is dropped."""
        config = self.config
        if drops_caption(config.caption_dropout, config.seed, step, index):
            return []
        caption = choose_caption(self.training.captions[index], config.seed, step, index)
        seed = (step_seed(config.seed, step) << 32) + index
        return self.tokenizer.encode(caption, dropout=config.bpe_dropout, seed=seed)

    def evaluate(self, model: Prior) -> dict[str, float]:
        """The losses on the first caption of each held-out image, without BPE dropout, in nats per token."""
        count = min(HELD_OUT, len(self.held_out.captions))
        sums = {}
        for first in range(0, count, self.config.batch_size):
            last = min(first + self.config.batch_size, count)
            captions = [self.tokenizer.encode(caption) for caption, *_ in self.held_out.captions[first:last]]
            codes = self.held_out.codes[first:last].flatten(1).to(self.device)
            for name, value in model.loss(self.pack(captions), codes).items():
                sums[name] = sums.get(name, 0.0) + value.item() * (last - first)
        return {name: value / count for name, value in sums.items()}

    def save_samples(self, model: Prior, path: Path) -> None:
        """Writes one row per caption, held-out ones if there are any: the reconstruction, then generated images."""
        part: Tokens = self.held_out if self.held_out.captions else self.training
        chosen = torch.linspace(0, len(part.captions) - 1, min(SHOWN, len(part.captions))).long()
        captions = [part.captions[i][0] for i in chosen]
        text = self.pack([self.tokenizer.encode(caption) for caption in captions])
        seeds = torch.arange(len(captions) * CANDIDATES, device=self.device)
        generated = generate_codes(model, text, candidates=CANDIDATES, seeds=seeds).unflatten(0, (-1, CANDIDATES))
        codes = torch.cat([part.codes[chosen][:, None].to(self.device), generated], 1)
        images = self.dvae.decode(codes.flatten(0, 1)).cpu().unflatten(0, (-1, 1 + CANDIDATES))
        scale = max(1, 64 // self.dvae.config.image_size)
        save_png(image_grid([list(row) for row in images], captions, scale), path)

    def write_model(self, model: nn.Module, done: bool) -> None:
        save_part(self.config.out, "prior", model, self.made_with)

    def pack(self, captions: list[list[int]]) -> Tensor:
        """Token ids for the model, int64 [B, text_len]; captions that BPE dropout makes too long are truncated."""
        return self.model.pack_text(captions, truncate=True)


def train_prior(config: TrainPriorConfig, *, on_step: OnStep | None = None) -> Result:
    """Trains a prior; `on_step` receives the progress. Raises UserError for invalid input."""
    with output_directory(config, "prior"):
        task = PriorTask(config)
        identity = task.made_with | {"captions": digest("\n".join(chain(*task.training.captions)))}
        return train(task, config, identity, on_step)
