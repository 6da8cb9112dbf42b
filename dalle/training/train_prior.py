"""Stage two: the prior over captions and codes (Ramesh et al. 2021, App. B.2)."""

import math
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle import config as configs
from dalle import images
from dalle.generation.sampler import generate_codes
from dalle.models.checkpoint import fingerprint, load_dvae, save_part
from dalle.models.prior import Prior, PriorConfig
from dalle.models.tokens import Tokens, digest, load_tokens
from dalle.runtime import OnStep
from dalle.tokenizer import Tokenizer
from dalle.training.feed import batch_indices, choose_caption, step_seed
from dalle.training.loop import Result, TrainConfig, prepare, train
from dalle.training.optimizer import adamw
from dalle.training.schedules import cosine, warmup

HELD_OUT = 256  # captioned pictures an evaluation looks at
SHOWN, CANDIDATES = 8, 6  # captions and pictures of each in a sample grid


@dataclass(frozen=True, kw_only=True)
class TrainPriorConfig(TrainConfig):
    """Trains the prior on the codes in a model directory and writes prior.json and prior.safetensors."""

    preset: str = "tiny"
    """Size of the model: tiny, small, medium, dalle-2.8b, dalle-5.6b or dalle-12b."""
    model: PriorConfig | None = None
    """The model in every detail, in place of the preset. Its grid and its vocabularies are those of the dVAE and the
    tokenizer, whatever is said here."""
    lr: float = 1e-3
    """Peak of the learning rate (the published one is 4.5e-4); falls by a cosine to 1/32 of it."""
    warmup: int = 100
    """Updates over which the learning rate rises (the published number is 5000)."""
    average_decay: float = 0.999
    """Of the running average of the weights (published: 0.99, taken every 25 updates)."""
    bpe_dropout: float = 0.1
    """Probability with which a merge of the tokenizer is passed over in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check(self, "be positive and finite", lr=0 < self.lr < math.inf)
        configs.check(self, "be at least 0", warmup=self.warmup >= 0)
        configs.check(self, "be in [0, 1)", average_decay=0 <= self.average_decay < 1)
        configs.check(self, "be in [0, 1]", bpe_dropout=0 <= self.bpe_dropout <= 1)


class PriorTask:
    """Losses, schedules and evaluation of the prior, for the shared loop."""

    name = "prior"
    max_grad_norm = 4.0

    def __init__(self, config: TrainPriorConfig) -> None:
        self.config, self.device = config, prepare(config, self.name)
        self.average_decay = config.average_decay
        self.dvae = load_dvae(config.out).to(self.device)
        tokens = load_tokens(config.out, self.dvae)
        self.training, self.held_out = tokens["train"], tokens["heldout"]
        wanted = config.model or PriorConfig.preset(config.preset)
        self.tokenizer = Tokenizer.load(config.out / "tokenizer.json")
        rows, columns = self.training.codes.shape[1:]
        size = replace(
            wanted,
            grid=(rows, columns),
            image_vocab=self.dvae.config.vocab,
            text_vocab=self.tokenizer.vocab_size,
        )
        self.model = Prior(size).to(self.device)
        self.optimizer = adamw(self.model, betas=(0.9, 0.96), weight_decay=4.5e-2)

    def learning_rate(self, step: int, fraction: float) -> float:
        return warmup(step, self.config.warmup) * cosine(self.config.lr, self.config.lr / 32, fraction)

    def losses(self, step: int, fraction: float) -> dict[str, Tensor]:
        config = self.config
        indices = batch_indices(len(self.training.captions), config.batch_size, config.seed, step)
        seed = step_seed(config.seed, step)
        captions = [
            self.tokenizer.encode(
                choose_caption(self.training.captions[i], config.seed, step, i),
                dropout=config.bpe_dropout,
                seed=(seed << 32) + i,
            )
            for i in indices.tolist()
        ]
        return self.model.loss(self.pack(captions), self.training.codes[indices].flatten(1).to(self.device))

    def evaluate(self, model: Prior) -> dict[str, float]:
        """Nats per token of text and image, and the two weighted, on whole captions, the first of each picture."""
        count = min(HELD_OUT, len(self.held_out.captions))
        sums = {}
        for first in range(0, count, self.config.batch_size):
            last = min(first + self.config.batch_size, count)
            captions = [self.tokenizer.encode(caption) for caption, *_ in self.held_out.captions[first:last]]
            codes = self.held_out.codes[first:last].flatten(1).to(self.device)
            for name, value in model.loss(self.pack(captions), codes).items():
                sums[name] = sums.get(name, 0.0) + value.item() * (last - first)
        return {name: value / count for name, value in sums.items()}

    def draw_samples(self, model: Prior, path: Path) -> None:
        """For a few captions, held-out ones if there are any: the picture as the dVAE sees it, then drawn ones."""
        part: Tokens = self.held_out if self.held_out.captions else self.training
        chosen = torch.linspace(0, len(part.captions) - 1, min(SHOWN, len(part.captions))).long()
        captions = [part.captions[i][0] for i in chosen]
        text = self.pack([self.tokenizer.encode(caption) for caption in captions])
        seeds = torch.arange(len(captions) * CANDIDATES, device=self.device)
        drawn = generate_codes(model, text, candidates=CANDIDATES, seeds=seeds).unflatten(0, (-1, CANDIDATES))
        codes = torch.cat([part.codes[chosen][:, None].to(self.device), drawn], 1)
        pictures = self.dvae.decode(codes.flatten(0, 1)).cpu().unflatten(0, (-1, 1 + CANDIDATES))
        scale = max(1, 64 // self.dvae.config.image_size)
        images.save(images.grid([list(row) for row in pictures], captions, scale), path)

    def write_model(self, model: nn.Module, done: bool) -> None:
        save_part(self.config.out, "prior", model)

    def pack(self, captions: list[list[int]]) -> Tensor:
        """Captions too long for the model are cut: dropout makes some of them long now and then."""
        return self.model.pack_text(captions, truncate=True)


def train_prior(config: TrainPriorConfig, *, on_step: OnStep | None = None) -> Result:
    """Trains a prior; `on_step` receives Progress. Raises UserError for what the user can mend."""
    task = PriorTask(config)
    identity = {"dvae": fingerprint(task.dvae.encoder), "captions": digest("\n".join(chain(*task.training.captions)))}
    identity["tokenizer"] = digest((config.out / "tokenizer.json").read_text(encoding="utf-8"))
    return train(task, config, identity, on_step)
