"""Files that are either complete or not there: atomic writes, and reads that say in one sentence what is wrong."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dalle import config as configs
from dalle.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path`, complete and synced to disk, when the block ends well.

    If it does not, the previous file stays as it was; a failure to write is a UserError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({error}); what was there before is intact: make room or choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def writable_directory(path: Path) -> Path:
    """`path`, created if need be; a UserError at once if nothing can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(
            f"{path} is not a directory that can be written to ({error.strerror}); choose another"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, config: Any) -> None:
    """A configuration, atomically."""
    write_text(path, json.dumps(configs.to_dict(config), indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Atomically, as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives, where safetensors would let only the owner read
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors on the CPU and metadata of a safetensors file; a UserError if it is missing, damaged or another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); write it anew") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
