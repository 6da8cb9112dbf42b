"""The tokenized dataset in a model directory: image codes with captions, on which the prior is trained."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dalle.config import read_json
from dalle.errors import UserError
from dalle.files import read_tensors, write_tensors, write_text
from dalle.models.checkpoint import fingerprint
from dalle.models.dvae import DiscreteVAE

PARTS = ("train", "heldout")


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


def save_tokens(directory: Path, dvae: DiscreteVAE, parts: dict[str, Tokens], data: str) -> None:
    """Writes codes.safetensors and captions.json; `data` names the source of the images."""
    listing = {part: {"captions": tokens.captions, "keys": tokens.keys} for part, tokens in parts.items()}
    text = json.dumps(listing, ensure_ascii=False)
    metadata = {"dvae": fingerprint(dvae.encoder), "captions": digest(text), "data": data}
    write_text(directory / "captions.json", text)
    # int16 takes a quarter of the space of int64; vocabularies are far below 32,768.
    narrow = torch.int16 if dvae.config.vocab <= 2**15 else torch.int32
    write_tensors(directory / "codes.safetensors", {part: parts[part].codes.to(narrow) for part in PARTS}, metadata)


def load_tokens(directory: Path, dvae: DiscreteVAE) -> dict[str, Tokens]:
    """Loads what `save_tokens` wrote; raises UserError if it is missing, damaged, or was made with another dVAE."""
    codes_path, captions_path = Path(directory) / "codes.safetensors", Path(directory) / "captions.json"
    if not codes_path.exists():
        raise UserError(f"{directory} holds no codes ({codes_path.name} is missing): run `dalle tokenize` first")
    codes, metadata = read_tensors(codes_path)
    if metadata.get("dvae") != fingerprint(dvae.encoder):
        raise UserError(f"{codes_path} was made with another dVAE than {directory} holds: run `dalle tokenize` again")
    listing = read_json(captions_path)
    if metadata.get("captions") != digest(captions_path.read_text(encoding="utf-8")):
        raise UserError(f"{captions_path} does not belong to {codes_path.name}: run `dalle tokenize` again")
    if any(isinstance(captions, str) for part in PARTS for captions in listing[part]["captions"]):
        raise UserError(f"{captions_path} is of an earlier version: run `dalle tokenize` again")
    return {part: Tokens(codes[part].long(), **listing[part]) for part in PARTS}


def digest(text: str) -> str:
    """A short fingerprint of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
