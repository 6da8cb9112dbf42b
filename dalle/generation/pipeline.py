"""The pipeline of a trained model: load, save, generate, complete, score, reconstruct."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from PIL import Image
from torch import Tensor

import dalle_kernels as dk
from dalle import config as configs
from dalle.errors import UserError
from dalle.files import atomic_write, writable_directory, write_text
from dalle.generation.sampler import generate_codes, sequence_bytes
from dalle.images import square, to_pil, to_tensor, to_uint8
from dalle.models.checkpoint import load_parts, made_with, save_part
from dalle.models.clip import CLIP
from dalle.models.hub import model_directory
from dalle.models.prior import Prior
from dalle.models.sharded import with_whole_weights
from dalle.models.vqgan import ImageTokenizer
from dalle.runtime import choose_device, free_memory
from dalle.tokenizer import Tokenizer

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "guidance")  # options that `generate_codes` takes too
MAX_BATCH_SIZE = 512  # images; larger batches are no faster
DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")  # arguments of from_pretrained
MAX_BATCH_PIXELS = 2**20  # per pass of the dVAE and the CLIP

MODEL_CARD = """---
{{ card_data }}
---

A DALL·E 1: a discrete VAE, a sparse transformer prior, its tokenizer, and a CLIP if there is one.

```python
import dalle

pipeline = dalle.Pipeline.from_pretrained("owner/name")
[results] = pipeline.generate("a prompt", candidates=16)
results[0].image.save("best.png")
```
"""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The options that `Pipeline.generate` and `Pipeline.complete` share, except the seed."""

    candidates: int = 1
    """Images to generate per prompt."""
    top: int | None = None
    """Number of candidates to keep, those with the highest CLIP scores; by default all."""
    temperature: float = 1.0
    """Sampling temperature: below 1 sharpens the distribution, above 1 flattens it."""
    top_k: int | None = None
    """Sample each code from the k most likely ones only."""
    top_p: float | None = None
    """Nucleus sampling: sample each code from the smallest set of codes with at least this total probability."""
    min_p: float | None = None
    """Exclude codes less probable than this fraction of the most probable one's probability."""
    guidance: float = 1.0
    """Scale of classifier-free guidance: above 1 follows the prompt more closely, for a model that was trained with
    --caption-dropout; 1 is off."""
    negative: str | None = None
    """With guidance, a text to steer away from; by default an empty one."""
    truncate: bool = False
    """Truncate prompts that are too long for the model instead of rejecting them."""
    batch_size: int | None = None
    """Images per batch; does not affect the result. By default as many as fit into memory, at most 512."""

    def __post_init__(self) -> None:
        """Raises UserError for invalid fields."""
        configs.check_types(self, GenerationOptions)
        configs.check_limits(self)
        batch_size = 1 if self.batch_size is None else self.batch_size
        configs.check(self, "be at least 1", candidates=self.candidates >= 1, batch_size=batch_size >= 1)
        top = self.candidates if self.top is None else self.top
        configs.check(self, f"be in [1, {self.candidates}], the candidates", top=1 <= top <= self.candidates)
        configs.check(self, "be in (0, 1]", min_p=self.min_p is None or 0 < self.min_p <= 1)
        configs.check(self, "be at least 0 and finite", guidance=0 <= self.guidance < math.inf)
        if self.negative is not None and self.guidance == 1:
            raise UserError("negative needs guidance: give a guidance above 1, such as 3")
        try:  # let `sample_tokens` check its options on a single row, before the work starts
            sampling = dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
            dk.sample_tokens(torch.zeros(1, 1), seed=0, **sampling, backend="reference")
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image."""

    prompt: str
    seed: int
    """The same model, prompt, options and seed generate the same image."""
    codes: Tensor
    """int64 [rows, columns]."""
    image: Image.Image
    """RGB."""
    score: float | None
    """CLIP score: the cosine similarity of image and prompt embeddings; None if the model has no CLIP."""


class Pipeline(ModelHubMixin, library_name="dalle-kernels", model_card_template=MODEL_CARD):
    """A trained model: dVAE, prior, tokenizer and, optionally, CLIP. Raises UserError if the parts do not match.

    >>> pipeline = Pipeline.from_pretrained("model")
    >>> [results] = pipeline.generate("a red heart", candidates=4, seed=7)
    >>> results[0].image.save("heart.png")
    """

    def __init__(self, dvae: ImageTokenizer, prior: Prior, tokenizer: Tokenizer, clip: CLIP | None = None) -> None:
        self._hub_mixin_config = None  # there is no config.json, because every part has its own
        side = dvae.config.grid
        if prior.config.grid != (side, side) or prior.config.image_vocab != dvae.config.vocab:
            raise UserError(
                f"the prior generates {prior.config.grid} codes out of {prior.config.image_vocab} and the dVAE reads "
                f"{(side, side)} out of {dvae.config.vocab}: they are not parts of one model"
            )
        _check_text_vocab("prior", prior, tokenizer)
        self.dvae, self.prior, self.tokenizer = dvae.eval(), prior.eval(), tokenizer
        self.clip = clip
        if clip is not None:
            _check_text_vocab("CLIP", clip, tokenizer)
            if clip.config.image_size != dvae.config.image_size:
                raise UserError(
                    f"the CLIP reads images of {clip.config.image_size} pixels and the dVAE decodes images of "
                    f"{dvae.config.image_size}: they are not parts of one model"
                )
            clip.eval()

    @classmethod
    def from_pretrained(  # pyrefly: ignore[bad-override-param-name]  # the inherited one takes repositories only
        cls, model: str | os.PathLike | None = None, *, device: str = "cpu", **download: Any
    ) -> Pipeline:
        """Loads a model.

        Args:
            model: a directory, or "owner/name" on the Hugging Face Hub; None loads the shipped model.
            device: where to compute, as PyTorch names it.
            download: for a model on the Hub: revision, token, cache_dir, force_download, local_files_only.

        Raises:
            UserError: the model does not exist, is incomplete or damaged, or its parts do not match.
        """
        if unknown := sorted(set(download) - set(DOWNLOAD)):
            raise TypeError(f"from_pretrained has no argument {unknown[0]!r}; it has device, {', '.join(DOWNLOAD)}")
        choose_device(device)
        # The inherited method would require a config.json, and pass its unchecked content to __init__.
        return cls._from_pretrained(model_id=model, device=device, **download)

    @classmethod
    def _from_pretrained(cls, *, model_id: str | os.PathLike | None, device: str = "cpu", **download: Any) -> Pipeline:
        return cls(*load_parts(model_directory(model_id, **download))).to(device)

    def save_pretrained(  # pyrefly: ignore[bad-override-param-name]
        self, directory: str | os.PathLike, *, model_card_kwargs: dict[str, Any] | None = None, **push: Any
    ) -> str | None:
        """Writes the .json and .safetensors of every part, tokenizer.json, and README.md if there is none.

        Each file is written atomically. `huggingface_hub`'s `push_to_hub` uploads the same files. The other arguments
        are those of `huggingface_hub.ModelHubMixin.save_pretrained`. Raises UserError if the directory is not writable.
        """
        directory = writable_directory(Path(directory))
        if not (directory / "README.md").exists():
            write_text(directory / "README.md", str(self.generate_model_card(**model_card_kwargs or {})))
        return super().save_pretrained(directory, model_card_kwargs=model_card_kwargs, **push)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_part(save_directory, "dvae", self.dvae)
        with atomic_write(save_directory / "tokenizer.json") as temporary:
            self.tokenizer.save(temporary)
        belongs = made_with(save_directory, self.dvae)
        save_part(save_directory, "prior", self.prior, belongs)
        if self.clip is not None:
            save_part(save_directory, "clip", self.clip, belongs)
        else:  # an earlier model's CLIP must not score this model's images
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
        """The device of the models."""
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
        min_p: float | None = None,
        guidance: float = 1.0,
        negative: str | None = None,
        truncate: bool = False,
        batch_size: int | None = None,
    ) -> list[list[GeneratedImage]]:
        """Generates images for every prompt.

        Args:
            prompts: one prompt, or a sequence of prompts.
            candidates: images to generate per prompt.
            top: number of candidates to keep, those with the highest CLIP scores; by default all.
            seed: seed of candidate 0, in [0, 2^62); candidate i uses seed + i. Either one for all prompts, or a
                sequence with one per prompt, which gives the same images as separate calls. By default random, the
                same for all prompts.
            temperature: sampling temperature; below 1 sharpens the distribution, above 1 flattens it.
            top_k: sample each code from the k most likely ones only.
            top_p: sample each code from the smallest set of codes with at least this total probability.
            min_p: exclude codes less probable than this fraction of the most probable one's probability.
            guidance: scale s of classifier-free guidance, u + s (c - u), where c are the logits for the prompt and u
                those for `negative`; 1 is off. It needs a model that was trained with dropped captions, and twice the
                time.
            negative: with guidance, a text to steer away from; by default an empty one.
            truncate: truncate prompts that are too long for the model instead of rejecting them.
            batch_size: images per batch; does not affect the result. By default as many as fit into memory, at most
                512.

        Returns:
            One list per prompt: sorted by score, best first, if the model has a CLIP, and otherwise by seed.

        Raises:
            UserError: there is no prompt, a prompt is empty or too long, an option is out of range, the number of
                seeds differs from that of the prompts, or `top` needs a ranking and the model has no CLIP.
        """
        options = GenerationOptions(
            candidates=candidates,
            top=top,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance=guidance,
            negative=negative,
            truncate=truncate,
            batch_size=batch_size,
        )
        prompts = _prompts([prompts] if isinstance(prompts, str) else prompts)
        return self._generate(prompts, first_seeds(seed, len(prompts)), options)

    def complete(
        self,
        image: Image.Image | Tensor,
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
        min_p: float | None = None,
        guidance: float = 1.0,
        negative: str | None = None,
        truncate: bool = False,
        batch_size: int | None = None,
    ) -> list[GeneratedImage]:
        """Regenerates a part of an image (inpainting). Codes are conditioned on all codes before them in raster order.

        Args:
            image: an image of any size; or a tensor [3, S, S] of the model's size, uint8 or float in [0, 1]; or codes,
                int64 [rows, columns].
            prompt: a description of the whole image.
            rows: number of rows of codes to keep, from the top.
            mask: in place of `rows`, which codes to regenerate, bool [rows, columns]; the last one, at the bottom
                right, must be among them.
            candidates, top, seed, temperature, top_k, top_p, min_p, guidance, negative, truncate, batch_size: see
                `generate`.

        Returns:
            The generated images, sorted as in `generate`.

        Raises:
            UserError: see `generate`; or the image, `rows` or `mask` does not match the model.
        """
        options = GenerationOptions(
            candidates=candidates,
            top=top,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance=guidance,
            negative=negative,
            truncate=truncate,
            batch_size=batch_size,
        )
        resample = self.completion_mask(rows, mask)
        return self._generate(_prompts([prompt]), first_seeds(seed, 1), options, self.codes(image), resample)[0]

    def completion_mask(self, rows: int | None = None, mask: Tensor | None = None) -> Tensor:
        """Which codes `complete` regenerates for these arguments, bool [rows, columns]; raises UserError."""
        side = self.dvae.config.grid
        if mask is not None and rows is None:
            return torch.as_tensor(mask)
        if rows is None or mask is not None:
            raise UserError("it is not clear what to keep of the image: give either rows or mask")
        configs.check_type("rows", rows, int)
        if not 1 <= rows < side:
            raise UserError(f"rows, the rows of codes to keep, must be in [1, {side}), not {rows}")
        return (torch.arange(side) >= rows)[:, None].expand(side, side)

    @torch.inference_mode()
    def score(self, images: Tensor | Sequence[Image.Image], prompt: str, truncate: bool = False) -> Tensor:
        """CLIP scores: cosine similarities of the images with a prompt, float32 [B], on the CPU.

        Args:
            images: images of any size, or a tensor [B, 3, S, S] of the model's size, uint8 or float in [0, 1].
            prompt: the text to compare with.
            truncate: truncate the prompt if it is too long instead of rejecting it.

        Raises:
            UserError: the model has no CLIP, or the images or the prompt do not match the model.
        """
        ids = [self.tokenizer.encode(text) for text in _prompts([prompt])]
        text = self._clip().encode_text(self._clip().pack_text(ids, truncate))
        if isinstance(images, Tensor):
            _check_pixels(images)
        else:
            images = torch.cat([self._square(image).cpu() for image in images])
        scores = [self._clip().encode_images(batch.to(self.device)) @ text[0] for batch in self._batches(images)]
        return torch.cat(scores).float().cpu()

    @torch.inference_mode()
    def reconstruct(self, image: Image.Image | Tensor) -> Image.Image:
        """Encodes an image, as `complete` takes it, and decodes the codes; RGB of the model's size."""
        return to_pil(self.dvae.reconstruct(self._square(image))[0])

    @torch.inference_mode()
    def codes(self, image: Image.Image | Tensor) -> Tensor:
        """Codes of an image, as `complete` takes it, int64 [rows, columns]; codes are returned unchanged."""
        if isinstance(image, Tensor) and image.dtype == torch.int64:
            return image
        return self.dvae.codes(self._square(image))[0]

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Decodes codes, int64 [B, rows, columns], to images, uint8 [B, 3, S, S], on the CPU."""
        decoded = (self.dvae.decode(batch.to(self.device)) for batch in self._batches(codes))
        return torch.cat([to_uint8(batch).cpu() for batch in decoded])

    def _generate(
        self,
        prompts: list[str],
        first: list[int],
        options: GenerationOptions,
        given: Tensor | None = None,
        resample: Tensor | None = None,
    ) -> list[list[GeneratedImage]]:
        """Generates candidates for every prompt; `first` are the seeds of their first candidates."""
        top = options.candidates if options.top is None else options.top
        if top < options.candidates:
            self._clip()
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        text = self.prior.pack_text(ids, options.truncate)
        if self.clip is not None:
            self.clip.pack_text(ids, options.truncate)  # raises before the work if a prompt is too long for the CLIP
        seeds = torch.tensor(first)[:, None] + torch.arange(options.candidates)
        codes = self._sample_codes(text, seeds, options, given, resample)
        return [self._best(*row, top, options.truncate) for row in zip(prompts, codes, seeds, strict=True)]

    def _sample_codes(
        self, text: Tensor, seeds: Tensor, options: GenerationOptions, given: Tensor | None, resample: Tensor | None
    ) -> Tensor:
        """Codes for seeds [P, C], int64 [P, C, rows, columns] on the CPU, generated in batches."""
        batch_size = int(options.batch_size or self._fitting_batch_size(options))  # may be NumPy's
        prompts_per_batch = max(1, batch_size // int(options.candidates))
        how = {name: getattr(options, name) for name in SAMPLING}
        avoided = [] if options.negative is None else self.tokenizer.encode(options.negative)
        avoided = self.prior.pack_text([avoided], options.truncate)
        prior, results = with_whole_weights(self.prior), []
        for rows, row_seeds in zip(text.split(prompts_per_batch), seeds.split(prompts_per_batch), strict=True):
            row_codes = []
            for batch in row_seeds.split(batch_size, dim=1):
                codes = generate_codes(
                    prior,
                    rows,
                    candidates=batch.shape[1],
                    seeds=batch.flatten().to(self.device),
                    given=None if given is None else given.expand(len(rows), *given.shape),
                    resample=resample,
                    negative=avoided.expand(len(rows), -1),
                    **how,
                )
                row_codes.append(codes.cpu().unflatten(0, tuple(batch.shape)))
            results.append(torch.cat(row_codes, 1))
        return torch.cat(results)

    def _best(self, prompt: str, codes: Tensor, seeds: Tensor, top: int, truncate: bool) -> list[GeneratedImage]:
        """The `top` candidates by CLIP score, or all sorted by seed if the model has no CLIP."""
        pixels = self.decode(codes)
        scores, order = [None] * len(seeds), range(len(seeds))
        if self.clip is not None:
            scores = self.score(pixels, prompt, truncate).tolist()
            order = sorted(order, key=lambda i: -scores[i])
        return [GeneratedImage(prompt, int(seeds[i]), codes[i], to_pil(pixels[i]), scores[i]) for i in order[:top]]

    def _clip(self) -> CLIP:
        if self.clip is None:
            raise UserError("the model has no CLIP, which scores and ranking need: train one with dalle train clip")
        return self.clip

    def _square(self, image: Image.Image | Tensor) -> Tensor:
        """An image as a batch of one of the model's size, [1, 3, S, S], on the device."""
        side = self.dvae.config.image_size
        pixels = to_tensor(square(image, side)) if isinstance(image, Image.Image) else image
        _check_pixels(pixels)
        if pixels.shape != (3, side, side):
            raise UserError(f"an image as a tensor must be {[3, side, side]}, not {list(pixels.shape)}")
        return pixels[None].to(self.device)

    def _batches(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Splits a tensor into batches of at most MAX_BATCH_PIXELS pixels of the model's images."""
        return tensor.split(max(1, MAX_BATCH_PIXELS // self.dvae.config.image_size**2))

    def _fitting_batch_size(self, options: GenerationOptions) -> int:
        """The number of images whose generation takes half the free memory, at most MAX_BATCH_SIZE."""
        sequences = 1 if options.guidance == 1 else 2  # per image
        fit = free_memory(self.device) // 2 // (sequences * sequence_bytes(self.prior, options.candidates))
        return max(1, min(fit, MAX_BATCH_SIZE))


def first_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """The seeds of candidate 0 of `count` prompts, from one for all, one per prompt, or None for a random one."""
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * count
    if len(seeds) != count:
        raise UserError(f"there are {len(seeds)} seeds for {count} prompts: give one for each, or one for all")
    for value in seeds:
        configs.check_type("seed", value, int)
        if not 0 <= value < 2**62:
            raise UserError(f"seed must be in [0, 2^62), not {value}")
    return seeds


def _prompts(prompts: object) -> list[str]:
    """The prompts as a list; raises UserError unless they are strings, at least one."""
    if not isinstance(prompts, Iterable):
        raise UserError(f"prompts must be a string or a sequence of strings, not {prompts!r}")
    found = list(prompts)
    if not found:
        raise UserError("there is no prompt: give at least one")
    for prompt in found:
        configs.check_type("a prompt", prompt, str)
    return found


def _check_pixels(image: object) -> None:
    """Raises UserError unless `image` is a tensor of pixels."""
    if not isinstance(image, Tensor):
        raise UserError(f"an image must be a Pillow image or a tensor, not {type(image).__name__}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise UserError(f"an image as a tensor must be uint8 or float in [0, 1], not {image.dtype}")
    if image.is_floating_point() and not image.isfinite().all():
        raise UserError("an image as a tensor must be finite, and this one has NaN or infinite pixels")


def _check_text_vocab(name: str, model: Prior | CLIP, tokenizer: Tokenizer) -> None:
    if model.config.text_vocab != tokenizer.vocab_size:
        raise UserError(
            f"the {name} reads {model.config.text_vocab} text tokens and the tokenizer has {tokenizer.vocab_size}: "
            "they are not parts of one model"
        )
