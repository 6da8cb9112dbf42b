"""Finds a model: the shipped one, one in a directory, or one on the Hugging Face Hub."""

import os
import re
from pathlib import Path
from typing import Any

from dalle.errors import UserError

SHIPPED = Path(__file__).parents[1] / "shipped"


def model_directory(model: str | os.PathLike | None = None, **download: Any) -> Path:
    """The directory of a model; downloads it first if it is on the Hub.

    Args:
        model: a directory, or "owner/name" on the Hub; None is the shipped model.
        download: see `huggingface_hub.snapshot_download`.

    Raises:
        UserError: the model does not exist or cannot be downloaded.
    """
    if model is None:
        return _shipped()
    directory = Path(model)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UserError(f"{model} is a file: give the directory of a trained model")
    if not isinstance(model, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(f"{model} does not exist: give the directory of a trained model")
    return _download(model, **download)


def _shipped() -> Path:
    if not (SHIPPED / "prior.json").exists():
        raise UserError(
            f"this installation has no shipped model ({SHIPPED}/prior.json is missing): "
            "reinstall the package, or give the directory of a trained model"
        )
    return SHIPPED


def _download(model: str, **download: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    weights = [f"{part}.safetensors" for part in ("dvae", "prior", "clip")]
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", *weights], **download))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{model} is not a directory, and the Hugging Face Hub does not provide it ({reason}): check the name"
        ) from error
