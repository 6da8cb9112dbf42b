"""`--init`: training that starts from the weights of another model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from dalle.errors import UserError
from dalle.files import read_header
from dalle.models.checkpoint import load_clip, load_prior
from dalle.models.clip import CLIP
from dalle.models.hub import model_directory
from dalle.models.prior import Prior
from dalle.models.variant import VariantPriorConfig
from dalle.tokenizer import Tokenizer

Model = TypeVar("Model", bound=nn.Module)


class Init(Protocol):
    """The options of a command that has `--init`."""

    @property
    def out(self) -> Path: ...

    @property
    def init(self) -> str | None: ...


class TextInit(Init, Protocol):
    """Those of a command that trains a model of text."""

    @property
    def new_tokenizer(self) -> bool: ...


def init_directory(config: Init) -> Path | None:
    """The directory of the model to start from, or None.

    Raises UserError if there is no such model, it is `out` itself, or a configuration of the model is given as well.
    """
    if config.init is None:
        return None
    for name in ("preset", "model"):
        if getattr(config, name, None) not in (None, getattr(type(config), name, None)):
            raise UserError(f"--init keeps the configuration of its model: omit --{name} or --init")
    directory = model_directory(None if config.init == "shipped" else config.init)
    if directory.resolve() == config.out.resolve():
        raise UserError(f"--init {config.init} is --out itself, whose weights would be replaced: choose another --out")
    return directory


def initial_prior(directory: Path, made_with: Mapping[str, str], tokenizer: Tokenizer, config: TextInit) -> Prior:
    """The prior of a model directory, for codes and a tokenizer that `made_with` gives the fingerprints of.

    Raises UserError if its codes are of another dVAE, or its tokenizer is another one and no new one is asked for.
    """
    prior = load_prior(directory)
    if _recorded(directory, "prior").get("dvae", made_with["dvae"]) != made_with["dvae"]:
        raise UserError(
            f"{directory} generates codes of another dVAE than {config.out} holds: run `dalle tokenize` with --init "
            f"{config.init} and another --out"
        )
    if _is_new(directory, "prior", made_with, tokenizer, prior.config.text_vocab, config):
        if isinstance(prior.config, VariantPriorConfig) and (prior.config.prefix or prior.config.suffix):
            raise UserError(
                f"the text of {directory} begins or ends with tokens of its own tokenizer, which no other has: omit "
                f"--new-tokenizer, and run `dalle tokenize` with --init {config.init} without --text-vocab"
            )
        return _with_vocabulary(prior, tokenizer, "text_embedding.weight", "text_head.weight", "text_head.bias")
    return prior


def initial_clip(
    directory: Path, made_with: Mapping[str, str], tokenizer: Tokenizer, image_size: int, config: TextInit
) -> CLIP:
    """The CLIP of a model directory. Raises UserError as `initial_prior`, or if it reads images of another size."""
    clip = load_clip(directory)
    if clip.config.image_size != image_size:
        raise UserError(
            f"the CLIP of {directory} reads images of {clip.config.image_size} pixels and the dVAE of {config.out} has "
            f"{image_size}: omit --init"
        )
    if _is_new(directory, "clip", made_with, tokenizer, clip.config.text_vocab, config):
        return _with_vocabulary(clip, tokenizer, "text.embedding.weight")
    return clip


def _recorded(directory: Path, name: str) -> dict[str, str]:
    return read_header(directory / f"{name}.safetensors")[1]


def _is_new(
    directory: Path, name: str, made_with: Mapping[str, str], tokenizer: Tokenizer, text_vocab: int, config: TextInit
) -> bool:
    """Whether the tokenizer is not that of the model; UserError if that was not asked for."""
    theirs = _recorded(directory, name).get("tokenizer", made_with["tokenizer"])  # not in files of earlier versions
    if theirs == made_with["tokenizer"] and text_vocab == tokenizer.vocab_size:
        return False
    if not config.new_tokenizer:
        raise UserError(
            f"{config.out} has another tokenizer than {directory}: run `dalle tokenize` with --init {config.init}, "
            "which keeps it, or add --new-tokenizer, which trains the text embeddings anew"
        )
    return True


def _with_vocabulary(model: Model, tokenizer: Tokenizer, embedding: str, *heads: str) -> Model:
    """The model for another tokenizer: only the embeddings of text tokens and the heads start anew.

    The embeddings of special tokens, which follow those of text tokens, are kept.
    """
    config: Any = model.config
    other = type(model)(replace(config, text_vocab=tokenizer.vocab_size))
    state, fresh = model.state_dict(), other.state_dict()
    special = state[embedding][config.text_vocab :]
    state[embedding] = torch.cat([fresh[embedding][: tokenizer.vocab_size], special])
    other.load_state_dict(state | {name: fresh[name] for name in heads})
    return other
