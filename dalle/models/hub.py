"""Where a model lies: in the package, in a directory, or on the Hugging Face Hub."""

import os
import re
from pathlib import Path
from typing import Any

from dalle.errors import UserError

SHIPPED = Path(__file__).parents[1] / "shipped"


def model_directory(model: str | os.PathLike | None = None, **download: Any) -> Path:
    """The directory of a model; one on the Hub is downloaded first.

    Args:
        model: a directory, or "owner/name" on the Hub; None is the model that comes with the package.
        download: see `huggingface_hub.snapshot_download`.

    Raises:
        UserError: there is no such model.
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
            f"no model came with this installation ({SHIPPED}/prior.json is missing): "
            "install the package again, or name the directory of a model that you trained"
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
            f"{model} is neither a directory nor a model that the Hugging Face Hub gives out ({reason})"
        ) from error
