"""`dalle info`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from dalle.cli.parsing import parse
from dalle.errors import UserError
from dalle.models.checkpoint import description, load_clip, load_dvae, load_prior
from dalle.models.tokens import load_tokens


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Describes the parts of a model directory; without one, the installation and the kernels that would run."""

    model: Annotated[Path | None, tyro.conf.Positional] = None
    """Directory of a trained model."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    config = parse(InfoConfig, "info", argv)
    facts = _installation() if config.model is None else _model(config.model)
    print(json.dumps(facts, indent=2) if config.json else _lines(facts))
    return 0


def _installation() -> dict:
    from dalle_kernels import info

    return info.collect()


def _model(directory: Path) -> dict:
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give the directory of a trained model")
    parts = {}
    if (directory / "dvae.json").exists():
        dvae = load_dvae(directory)
        parameters = {"encoder": _count(dvae.encoder), "decoder": _count(dvae.decoder)}
        parts["dvae"] = description("dvae", dvae) | {"code grid": dvae.config.grid, "parameters": parameters}
        if (directory / "codes.safetensors").exists():
            tokens = load_tokens(directory, dvae)
            parts["tokenized images"] = {part: len(tokens[part].captions) for part in tokens}
    if (directory / "prior.json").exists():
        prior = load_prior(directory)
        parts["prior"] = description("prior", prior) | {"parameters": _count(prior)}
    if (directory / "clip.json").exists():
        clip = load_clip(directory)
        parts["clip"] = description("clip", clip) | {"parameters": _count(clip)}
    if not parts:
        raise UserError(
            f"{directory} holds no dvae.json, prior.json or clip.json: give the directory of a trained model"
        )
    return parts


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _lines(values: dict, indent: int = 0) -> str:
    margin, lines = "  " * indent, []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{margin}{key}:", _lines(value, indent + 1)]
        elif isinstance(value, list):
            lines.append(f"{margin}{key}: {', '.join(map(str, value))}")
        else:
            lines.append(f"{margin}{key}: {f'{value:,}' if type(value) is int else value}")
    return "\n".join(lines)
