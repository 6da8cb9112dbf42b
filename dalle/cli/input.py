"""Image files given on the command line."""

from pathlib import Path

from PIL import Image

from dalle.data.folder import read_image
from dalle.data.source import UnreadableImage
from dalle.errors import UserError


def read_square(path: Path, size: int) -> Image.Image:
    """Reads the centre square of an image file, RGB, scaled to `size` pixels; a UserError names an unreadable file."""
    try:
        return read_image(path, size)
    except UnreadableImage as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
