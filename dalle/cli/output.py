"""Where pictures go: checked before the work, so that hours of it cannot end in a wrong path."""

import tempfile
from pathlib import Path

from dalle.errors import UserError


def picture_path(path: Path) -> Path:
    """`path` if a PNG can be written there; otherwise a UserError."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path} is not a name for a PNG picture: choose one that ends in .png")
    if path.is_dir():
        raise UserError(f"{path} is a directory: choose a file name")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another place") from error
