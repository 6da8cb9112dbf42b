"""Picture files that the user names."""

from pathlib import Path

from PIL import Image

from dalle.data.folder import read_picture
from dalle.data.source import UnreadablePicture
from dalle.errors import UserError


def read_square(path: Path, size: int) -> Image.Image:
    """A picture file as an RGB square of `size` pixels, its centre; a UserError that names it if it cannot be read."""
    try:
        return read_picture(path, size)
    except UnreadablePicture as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error
