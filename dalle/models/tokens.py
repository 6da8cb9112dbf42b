"""The tokenized dataset in a model directory: image codes with captions, on which the prior is trained."""

import json
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.errors import UserError
from dalle.files import digest, parse_json, read_tensors, read_text, write_tensors, write_text
from dalle.models.checkpoint import check_made_with, made_with
from dalle.models.vqgan import ImageTokenizer

PARTS = ("train", "heldout")
MAX_CAPTIONS = 4 << 30  # bytes: some twenty million images


@dataclass(frozen=True)
class Tokens:
    """Codes and captions of one split: image i has `codes[i]`, `captions[i]` and the name `keys[i]`.

    Every crop of an image counts as an image.
    """

    codes: Tensor
    """int64 [n, rows, columns]."""
    captions: list[list[str]]
    """At least one per image."""
    keys: list[str]
    """Names of the images in the source."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Unusable images, as (name, reason)."""


def save_tokens(directory: Path, dvae: ImageTokenizer, parts: dict[str, Tokens], data: str) -> None:
    """Writes codes.safetensors and captions.json, next to tokenizer.json; `data` names the source of the images."""
    listing = {part: {"captions": tokens.captions, "keys": tokens.keys} for part, tokens in parts.items()}
    text = json.dumps(listing, ensure_ascii=False)
    metadata = made_with(directory, dvae) | {"captions": digest(text), "data": data}
    write_text(directory / "captions.json", text)
    # int16 takes a quarter of the space of int64; vocabularies are far below 32,768.
    narrow = torch.int16 if dvae.config.vocab <= 2**15 else torch.int32
    write_tensors(directory / "codes.safetensors", {part: parts[part].codes.to(narrow) for part in PARTS}, metadata)


def load_tokens(directory: Path, dvae: ImageTokenizer) -> dict[str, Tokens]:
    """Loads what `save_tokens` wrote; raises UserError if it is missing, damaged, or was made with another dVAE."""
    codes_path, captions_path = Path(directory) / "codes.safetensors", Path(directory) / "captions.json"
    if not codes_path.exists():
        raise UserError(f"{directory} holds no codes ({codes_path.name} is missing): run `dalle tokenize` first")
    codes, metadata = read_tensors(codes_path)
    again = "run `dalle tokenize` again"
    check_made_with(codes_path, metadata, made_with(directory, dvae), again)
    text = read_text(captions_path, MAX_CAPTIONS)
    if metadata.get("captions") != digest(text):
        raise UserError(f"{captions_path} does not belong to {codes_path.name}: {again}")
    listing = parse_json(text, captions_path)
    try:
        return {part: _tokens(codes[part], listing[part], dvae) for part in PARTS}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{codes_path} and {captions_path.name} are damaged or of an earlier version: {again}"
        ) from error


def _tokens(codes: Tensor, listing: dict[str, Any], dvae: ImageTokenizer) -> Tokens:
    """Raises KeyError, TypeError or ValueError if the codes and captions are not those of images for this dVAE."""
    tokens = Tokens(codes.long(), **listing)
    side, count = dvae.config.grid, len(tokens.captions)
    if codes.is_floating_point() or codes.shape != (count, side, side) or len(tokens.keys) != count:
        raise ValueError("there must be a grid of codes for every image")
    if count and not 0 <= tokens.codes.min() <= tokens.codes.max() < dvae.config.vocab:
        raise ValueError("a code is outside the vocabulary")
    if not isinstance(tokens.keys, list) or not all(isinstance(texts, list) and texts for texts in tokens.captions):
        raise ValueError("an image has no list of captions")
    if not all(isinstance(text, str) for text in chain(tokens.keys, *tokens.captions)):
        raise ValueError("a caption is not a string")
    return tokens
