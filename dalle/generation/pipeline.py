"""A trained model, ready to draw: load, save, generate, complete, rank, reconstruct."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from PIL import Image
from torch import Tensor

import dalle_kernels as dk
from dalle import config as configs
from dalle import images
from dalle.errors import UserError
from dalle.files import replacing, writable_directory, write_text
from dalle.generation.sampler import generate_codes, sequence_bytes
from dalle.models.checkpoint import load_clip, load_dvae, load_prior, save_part
from dalle.models.clip import CLIP
from dalle.models.dvae import DiscreteVAE
from dalle.models.hub import model_directory
from dalle.models.prior import Prior
from dalle.runtime import free_memory
from dalle.tokenizer import Tokenizer

MOST_AT_ONCE = 512  # pictures; more of them gain no speed
PIXELS_AT_ONCE = 2**20  # of the pictures that the dVAE and the CLIP take in one pass

MODEL_CARD = """---
{{ card_data }}
---

A DALL·E 1: a discrete VAE, a sparse transformer prior, its tokenizer, and a CLIP if there is one.

```python
import dalle

pipeline = dalle.Pipeline.from_pretrained("owner/name")
[drawings] = pipeline.generate("a caption", candidates=16)
drawings[0].image.save("best.png")
```
"""


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How pictures are drawn: what `Pipeline.generate` and `Pipeline.complete` take besides the seed."""

    candidates: int = 1
    """Pictures for every caption."""
    top: int | None = None
    """How many of the candidates to keep, those that the CLIP finds to fit the caption best; by default all."""
    temperature: float = 1.0
    """Below 1 the likely is made likelier, above 1 less so."""
    top_k: int | None = None
    """Draw every code from the k most likely ones only."""
    top_p: float | None = None
    """Draw every code from the fewest codes that have this probability together."""
    truncate: bool = False
    """Cut captions that are too long for the model instead of refusing them."""
    batch_size: int | None = None
    """Pictures at a time, with no influence on what is drawn; by default as many as fit into memory, at most 512."""

    def __post_init__(self) -> None:
        batch_size = 1 if self.batch_size is None else self.batch_size
        configs.check(self, "be at least 1", candidates=self.candidates >= 1, batch_size=batch_size >= 1)
        top = self.candidates if self.top is None else self.top
        configs.check(self, f"be in [1, {self.candidates}], the candidates", top=1 <= top <= self.candidates)
        try:  # what `sample_tokens` says about a single row, before the work
            dk.sample_tokens(torch.zeros(1, 1), seed=0, **self.sampling, backend="reference")
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    @property
    def sampling(self) -> dict[str, Any]:
        """What is passed on to `dalle_kernels.sample_tokens`."""
        return dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


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
    score: float | None
    """How well it fits the prompt: the cosine similarity of the CLIP's embeddings, None without a CLIP."""


class Pipeline(ModelHubMixin, library_name="dalle-kernels", model_card_template=MODEL_CARD):
    """dVAE, prior, tokenizer and, if there is one, CLIP of a model directory.

    >>> pipeline = Pipeline.from_pretrained("model")
    >>> [drawings] = pipeline.generate("a red heart", candidates=4, seed=7)
    >>> drawings[0].image.save("heart.png")
    """

    def __init__(self, dvae: DiscreteVAE, prior: Prior, tokenizer: Tokenizer, clip: CLIP | None = None) -> None:
        self._hub_mixin_config = None  # there is no config.json: every part has its own
        side = dvae.config.grid
        if prior.config.grid != (side, side) or prior.config.image_vocab != dvae.config.vocab:
            raise UserError(
                f"the prior draws {prior.config.grid} codes out of {prior.config.image_vocab} and the dVAE reads "
                f"{(side, side)} out of {dvae.config.vocab}: they are not parts of one model"
            )
        _check_text_vocab("prior", prior, tokenizer)
        self.dvae, self.prior, self.tokenizer = dvae.eval(), prior.eval(), tokenizer
        self.clip = clip
        if clip is not None:
            _check_text_vocab("CLIP", clip, tokenizer)
            if clip.config.image_size != dvae.config.image_size:
                raise UserError(
                    f"the CLIP looks at pictures of {clip.config.image_size} pixels and the dVAE makes them of "
                    f"{dvae.config.image_size}: they are not parts of one model"
                )
            clip.eval()

    @classmethod
    def from_pretrained(  # pyrefly: ignore[bad-override-param-name]  # theirs is for repositories alone
        cls, model: str | os.PathLike | None = None, *, device: str = "cpu", **download: Any
    ) -> Pipeline:
        """Loads a model.

        Args:
            model: a directory, or "owner/name" on the Hugging Face Hub; None is the one that comes with the package.
            device: where to compute.
            download: for a model on the Hub: revision, token, cache_dir, force_download, local_files_only.

        Raises:
            UserError: there is no such model, it is incomplete or damaged, or its parts do not fit together.
        """
        # Not the inherited method: it asks for a config.json and passes what a stranger wrote there to __init__.
        return cls._from_pretrained(model_id=model, device=device, **download)

    @classmethod
    def _from_pretrained(cls, *, model_id: str | os.PathLike | None, device: str = "cpu", **download: Any) -> Pipeline:
        directory = model_directory(model_id, **download)
        dvae, prior = load_dvae(directory), load_prior(directory)
        tokenizer = Tokenizer.load(directory / "tokenizer.json")
        clip = load_clip(directory) if (directory / "clip.json").exists() else None
        return cls(dvae, prior, tokenizer, clip).to(device)

    def save_pretrained(  # pyrefly: ignore[bad-override-param-name]
        self, directory: str | os.PathLike, *, model_card_kwargs: dict[str, Any] | None = None, **push: Any
    ) -> str | None:
        """Writes every part's .json and .safetensors, tokenizer.json and a README.md if there is none, each atomically.

        `push_to_hub`, which is `huggingface_hub`'s, uploads the same files. The other arguments are those of
        `huggingface_hub.ModelHubMixin.save_pretrained`.
        """
        directory = writable_directory(Path(directory))
        if not (directory / "README.md").exists():
            write_text(directory / "README.md", str(self.generate_model_card(**model_card_kwargs or {})))
        return super().save_pretrained(directory, model_card_kwargs=model_card_kwargs, **push)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_part(save_directory, "dvae", self.dvae)
        save_part(save_directory, "prior", self.prior)
        with replacing(save_directory / "tokenizer.json") as temporary:
            self.tokenizer.save(temporary)
        if self.clip is not None:
            save_part(save_directory, "clip", self.clip)
        else:  # that of an earlier model must not rank this one's pictures
            for name in ("clip.json", "clip.safetensors"):
                (save_directory / name).unlink(missing_ok=True)

    def to(self, device: str | torch.device) -> Pipeline:
        """Moves the models; returns self."""
        for model in (self.dvae, self.prior, self.clip):
            if model is not None:
                model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.prior.parameters()).device

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        candidates: int = 1,
        top: int | None = None,
        seed: int | Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        truncate: bool = False,
        batch_size: int | None = None,
    ) -> list[list[Drawing]]:
        """Draws pictures for every prompt: the best first if the model has a CLIP, and else in the order of the seeds.

        Args:
            prompts: one caption or several.
            candidates: pictures for every caption.
            top: how many of the candidates to keep, those that the CLIP finds to fit the caption best; by default all.
            seed: of a caption's first candidate, in [0, 2^62); the others have the numbers that follow. One for all
                captions, or a sequence with one for each, which draws what separate calls would. By default another
                one every time, the same for all captions.
            temperature: below 1 the likely is made likelier, above 1 less so.
            top_k: draw every code from the k most likely ones only.
            top_p: draw every code from the fewest codes that have this probability together.
            truncate: cut captions that are too long for the model instead of refusing them.
            batch_size: pictures at a time, with no influence on what is drawn; by default as many as fit into memory,
                at most 512.

        Returns:
            A list for every prompt.

        Raises:
            UserError: there is no caption, an option is out of range, the seeds are not as many as the captions, a
                caption is too long, or `top` asks for a ranking that the model, without a CLIP, cannot make.
        """
        options = DrawOptions(
            candidates=candidates,
            top=top,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            truncate=truncate,
            batch_size=batch_size,
        )
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("there is no caption to draw: give at least one")
        return self._draw(prompts, first_seeds(seed, len(prompts)), options)

    def complete(
        self,
        picture: Image.Image | Tensor,
        *,
        prompt: str,
        rows: int | None = None,
        mask: Tensor | None = None,
        candidates: int = 1,
        top: int | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        truncate: bool = False,
        batch_size: int | None = None,
    ) -> list[Drawing]:
        """Draws a part of a picture anew. What is kept conditions what is drawn after it, in reading order.

        Args:
            picture: of any size, or a tensor [3, S, S] of the model's, or codes, int64 [rows, columns].
            prompt: the caption of the whole.
            rows: how many rows of codes to keep, from the top.
            mask: in place of `rows`, the codes to draw anew, bool [rows, columns]; the last, at the bottom right, must
                be among them.
            candidates, top, seed, temperature, top_k, top_p, truncate, batch_size: as of `generate`.

        Returns:
            The drawings, ordered as those of `generate`.

        Raises:
            UserError: as `generate`, or the picture, `rows` or `mask` does not fit the model.
        """
        options = DrawOptions(
            candidates=candidates,
            top=top,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            truncate=truncate,
            batch_size=batch_size,
        )
        region = self.region(rows, mask)
        return self._draw([prompt], first_seeds(seed, 1), options, self.codes(picture), region)[0]

    def region(self, rows: int | None = None, mask: Tensor | None = None) -> Tensor:
        """The codes that `complete` draws anew when it is told `rows` or `mask`, bool [rows, columns]."""
        side = self.dvae.config.grid
        if mask is not None and rows is None:
            return torch.as_tensor(mask)
        if rows is None or mask is not None:
            raise UserError("say what to keep of the picture: give either its first rows or a mask of what to redraw")
        if not 1 <= rows < side:
            raise UserError(f"rows, the rows of codes to keep, must be in [1, {side}), not {rows}")
        return (torch.arange(side) >= rows)[:, None].expand(side, side)

    @torch.inference_mode()
    def score(self, pictures: Tensor | Sequence[Image.Image], prompt: str, truncate: bool = False) -> Tensor:
        """How well pictures fit a prompt: cosine similarities of the CLIP's embeddings, float32 [B], on the CPU.

        Args:
            pictures: images of any size, or a tensor [B, 3, S, S] of the model's size, uint8 or float in [0, 1].
            prompt: the caption.
            truncate: cut the prompt if it is too long instead of refusing it.
        """
        text = self._clip().encode_text(self._clip().pack_text([self.tokenizer.encode(prompt)], truncate))
        if not isinstance(pictures, Tensor):
            pictures = torch.cat([self._square(picture).cpu() for picture in pictures])
        parts = [self._clip().encode_images(part.to(self.device)) @ text[0] for part in self._passes(pictures)]
        return torch.cat(parts).float().cpu()

    @torch.inference_mode()
    def reconstruct(self, image: Image.Image | Tensor) -> Image.Image:
        """A picture through the codes and back, as RGB of the model's size."""
        return images.to_pil(self.dvae.reconstruct(self._square(image))[0])

    @torch.inference_mode()
    def codes(self, picture: Image.Image | Tensor) -> Tensor:
        """Codes of a picture as `complete` takes it, int64 [rows, columns]; codes stay as they are."""
        if isinstance(picture, Tensor) and picture.dtype == torch.int64:
            return picture
        return self.dvae.codes(self._square(picture))[0]

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures of codes [B, rows, columns], uint8 [B, 3, S, S] on the CPU."""
        parts = (self.dvae.decode(part.to(self.device)) for part in self._passes(codes))
        return torch.cat([images.to_uint8(part).cpu() for part in parts])

    def _draw(
        self,
        prompts: list[str],
        first: list[int],
        options: DrawOptions,
        given: Tensor | None = None,
        redraw: Tensor | None = None,
    ) -> list[list[Drawing]]:
        """Draws for every prompt with the seeds from its `first` on."""
        top = options.candidates if options.top is None else options.top
        if top < options.candidates:
            self._clip()
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        text = self.prior.pack_text(ids, options.truncate)
        if self.clip is not None:
            self.clip.pack_text(ids, options.truncate)  # a caption it cannot read is refused before the work
        seeds = torch.tensor(first)[:, None] + torch.arange(options.candidates)
        codes = self._codes(text, seeds, options, given, redraw)
        return [self._best(*row, top, options.truncate) for row in zip(prompts, codes, seeds, strict=True)]

    def _codes(
        self, text: Tensor, seeds: Tensor, options: DrawOptions, given: Tensor | None, redraw: Tensor | None
    ) -> Tensor:
        """Codes of a picture for each of the seeds [P, C], int64 [P, C, rows, columns] on the CPU, pass by pass."""
        batch_size = options.batch_size or self._fitting(options.candidates)
        prompts_at_once = max(1, batch_size // options.candidates)
        drawn = []
        for rows, row_seeds in zip(text.split(prompts_at_once), seeds.split(prompts_at_once), strict=True):
            parts = []
            for part in row_seeds.split(batch_size, dim=1):
                codes = generate_codes(
                    self.prior,
                    rows,
                    candidates=part.shape[1],
                    seeds=part.flatten().to(self.device),
                    given=None if given is None else given.expand(len(rows), *given.shape),
                    redraw=redraw,
                    **options.sampling,
                )
                parts.append(codes.cpu().unflatten(0, tuple(part.shape)))
            drawn.append(torch.cat(parts, 1))
        return torch.cat(drawn)

    def _best(self, prompt: str, codes: Tensor, seeds: Tensor, top: int, truncate: bool) -> list[Drawing]:
        """The `top` drawings that fit the prompt best, or all in the order of their seeds."""
        pictures = self.decode(codes)
        scores, order = [None] * len(seeds), range(len(seeds))
        if self.clip is not None:
            scores = self.score(pictures, prompt, truncate).tolist()
            order = sorted(order, key=lambda i: -scores[i])
        return [Drawing(prompt, int(seeds[i]), codes[i], images.to_pil(pictures[i]), scores[i]) for i in order[:top]]

    def _clip(self) -> CLIP:
        if self.clip is None:
            raise UserError("the model has no CLIP, which ranking needs: train one with dalle train clip")
        return self.clip

    def _square(self, image: Image.Image | Tensor) -> Tensor:
        side = self.dvae.config.image_size
        picture = images.to_tensor(images.square(image, side)) if isinstance(image, Image.Image) else image
        if picture.shape != (3, side, side):
            raise UserError(f"a picture as a tensor must be {[3, side, side]}, not {list(picture.shape)}")
        return picture[None].to(self.device)

    def _passes(self, batch: Tensor) -> tuple[Tensor, ...]:
        """A batch in parts whose pictures fit into memory."""
        return batch.split(max(1, PIXELS_AT_ONCE // self.dvae.config.image_size**2))

    def _fitting(self, candidates: int) -> int:
        """How many pictures to draw at once: as many as half the free memory holds, at most MOST_AT_ONCE."""
        fit = free_memory(self.device) // 2 // sequence_bytes(self.prior, candidates)
        return max(1, min(fit, MOST_AT_ONCE))


def first_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """The seed of the first candidate of each of `count` captions; None draws one for all."""
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * count
    if len(seeds) != count:
        raise UserError(f"there are {len(seeds)} seeds for {count} captions: give one for each, or one for all")
    if bad := [s for s in seeds if not 0 <= s < 2**62]:
        raise UserError(f"seed must be in [0, 2^62), not {bad[0]}")
    return seeds


def _check_text_vocab(name: str, model: Prior | CLIP, tokenizer: Tokenizer) -> None:
    if model.config.text_vocab != tokenizer.vocab_size:
        raise UserError(
            f"the {name} reads {model.config.text_vocab} text tokens and the tokenizer has {tokenizer.vocab_size}: "
            "they are not parts of one model"
        )
