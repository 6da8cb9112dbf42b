"""A trained model, ready to draw: load, save, generate, complete, reconstruct."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import dalle_kernels as dk
from dalle import images
from dalle.dvae import DiscreteVAE
from dalle.errors import UserError
from dalle.files import replacing, writable_directory
from dalle.model_files import load_dvae, load_prior, save_part
from dalle.prior import Prior
from dalle.tokenizer import Tokenizer


@dataclass(frozen=True)
class Drawing:
    """One generated picture."""

    prompt: str
    seed: int
    """The same model, prompt and seed draw it again."""
    codes: Tensor
    """int64 [rows, columns]."""
    image: Image.Image
    """RGB."""


class Pipeline:
    """dVAE, prior and tokenizer of a model directory.

    >>> pipeline = Pipeline.from_pretrained("model")
    >>> [drawings] = pipeline.generate("a red heart", candidates=4, seed=7)
    >>> drawings[0].image.save("heart.png")
    """

    def __init__(self, dvae: DiscreteVAE, prior: Prior, tokenizer: Tokenizer):
        side = dvae.config.grid
        if prior.config.grid != (side, side) or prior.config.image_vocab != dvae.config.vocab:
            raise UserError(
                f"the prior draws {prior.config.grid} codes out of {prior.config.image_vocab} and the dVAE reads "
                f"{(side, side)} out of {dvae.config.vocab}: they are not parts of one model"
            )
        if prior.config.text_vocab != tokenizer.vocab_size:
            raise UserError(
                f"the prior reads {prior.config.text_vocab} text tokens and the tokenizer has {tokenizer.vocab_size}: "
                "they are not parts of one model"
            )
        self.dvae, self.prior, self.tokenizer = dvae.eval(), prior.eval(), tokenizer

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike, device: str = "cpu") -> Pipeline:
        """Loads a model directory, or "owner/name" from the Hugging Face Hub.

        Raises:
            UserError: there is no such model, it is incomplete or damaged, or its parts do not fit together.
        """
        directory = _directory(model)
        pipeline = cls(load_dvae(directory), load_prior(directory), Tokenizer.load(directory / "tokenizer.json"))
        return pipeline.to(device)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes dvae.json, dvae.safetensors, prior.json, prior.safetensors and tokenizer.json, each atomically."""
        directory = writable_directory(Path(directory))
        save_part(directory, "dvae", self.dvae)
        save_part(directory, "prior", self.prior)
        with replacing(directory / "tokenizer.json") as temporary:
            self.tokenizer.save(temporary)

    def to(self, device: str | torch.device) -> Pipeline:
        """Moves the models; returns self."""
        self.dvae.to(device)
        self.prior.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.prior.parameters()).device

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        candidates: int = 1,
        seed: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        truncate: bool = False,
        batch_size: int = 64,
        complete: Image.Image | Tensor | None = None,
        keep_rows: int = 0,
    ) -> list[list[Drawing]]:
        """Draws `candidates` pictures for every prompt.

        Args:
            prompts: one caption or several.
            candidates: pictures per prompt.
            seed: of the first candidate; candidate c has seed + c, for every prompt. None draws one.
            temperature, top_k, top_p: see `dalle_kernels.sample_tokens`.
            truncate: cut prompts that are too long instead of refusing them.
            batch_size: pictures drawn at a time; no influence on what is drawn.
            complete, keep_rows: a picture whose first `keep_rows` rows of codes are kept, the rest drawn anew.

        Returns:
            A list for every prompt.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if candidates < 1 or batch_size < 1:
            raise UserError(f"candidates and batch_size must be at least 1, not {candidates} and {batch_size}")
        sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        _check_sampling(sampling)
        text = self.prior.pack_text([self.tokenizer.encode(prompt) for prompt in prompts], truncate)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        prefix = self._prefix(complete, keep_rows)
        drawings = [[] for _ in prompts]
        step = max(1, batch_size // candidates)
        for first in range(0, len(prompts), step):
            rows = text[first : first + step]
            for start in range(0, candidates, batch_size):
                count = min(batch_size, candidates - start)
                seeds = torch.arange(seed + start, seed + start + count, device=self.device).repeat(len(rows))
                given = None if prefix is None else prefix.expand(len(rows), -1)
                codes = self.prior.generate(rows, candidates=count, seeds=seeds, prefix=given, **sampling)
                for i, drawing in enumerate(self._draw(codes, seeds)):
                    prompt = first + i // count
                    drawings[prompt].append(Drawing(prompts[prompt], *drawing))
        return drawings

    @torch.inference_mode()
    def reconstruct(self, image: Image.Image | Tensor) -> Image.Image:
        """A picture through the codes and back, as RGB of the model's size."""
        return images.to_pil(self.dvae.reconstruct(self._square(image))[0])

    @torch.inference_mode()
    def _draw(self, codes: Tensor, seeds: Tensor) -> list[tuple[int, Tensor, Image.Image]]:
        pictures = self.dvae.decode(codes)
        return [(int(s), c, images.to_pil(p)) for s, c, p in zip(seeds, codes.cpu(), pictures, strict=True)]

    @torch.no_grad()
    def _prefix(self, complete: Image.Image | Tensor | None, keep_rows: int) -> Tensor | None:
        side = self.dvae.config.grid
        if complete is None:
            if keep_rows:
                raise UserError(f"keep_rows is {keep_rows}, but there is no picture to complete")
            return None
        if not 0 <= keep_rows < side:
            raise UserError(f"keep_rows must be in [0, {side}), the rows of codes, not {keep_rows}")
        return self.dvae.codes(self._square(complete))[:, :keep_rows].flatten(1)

    def _square(self, image: Image.Image | Tensor) -> Tensor:
        side = self.dvae.config.image_size
        picture = images.to_tensor(images.square(image, side)) if isinstance(image, Image.Image) else image
        return picture[None].to(self.device)


def _check_sampling(sampling: dict) -> None:
    """Before the work: what `sample_tokens` says about a single row."""
    try:
        dk.sample_tokens(torch.zeros(1, 1), seed=0, **sampling)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def _directory(model: str | os.PathLike) -> Path:
    directory = Path(model)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UserError(f"{model} is a file: give the directory of a trained model")
    if not isinstance(model, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(f"{model} does not exist: give the directory of a trained model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "dvae.safetensors", "prior.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{model} is neither a directory nor a model that the Hugging Face Hub gives out ({reason})"
        ) from error
