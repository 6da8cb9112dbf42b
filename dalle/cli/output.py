"""Output paths, checked before the work starts, so that a long computation cannot end in a wrong path."""

import tempfile
from pathlib import Path

from dalle.errors import UserError


def png_path(path: Path) -> Path:
    """Returns `path` if a PNG can be written there; raises a UserError otherwise."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path} is not the name of a PNG file: choose one that ends in .png")
    if path.is_dir():
        raise UserError(f"{path} is a directory: choose a file name")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another path") from error
