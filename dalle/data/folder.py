"""A folder of captioned pictures, searched recursively."""

import os
import stat
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from dalle.data import crops
from dalle.data.captions import TABLES, FolderCaptions
from dalle.data.source import Sample, Source, UnreadablePicture
from dalle.errors import UserError
from dalle.images import square, to_tensor, upright

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # everything else Pillow can parse is attack surface
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb: 256 MiB of RGB


class FolderSource(Source):
    """The captioned pictures under ``root``, in the order of their names.

    Captions are in .txt files of the pictures' stems and in tables (`captions.FolderCaptions`). Opening reads all of
    them and every picture's header; pixels are decoded on use, so a truncated picture is found then. A picture is
    turned upright by its EXIF orientation, composited on white, scaled by an area filter until its short side is
    ``image_size``, and cropped to the centre square.
    """

    def __init__(self, root: str | Path, image_size: int) -> None:
        self.root = Path(root)
        self.image_size = image_size
        files, self.skipped = _find_files(self.root)
        pictures = [name for name in files if name.lower().endswith(SUFFIXES)]
        captions = FolderCaptions(self.root, files, pictures)
        self._items: list[tuple[str, tuple[str, ...]]] = []  # (key, captions)
        for key in pictures:
            try:
                _check_picture(self.root / key)
                if not captions.of(key):
                    raise UnreadablePicture("no caption")
                self._items.append((key, captions.of(key)))
            except UnreadablePicture as error:
                self.skipped.append((key, str(error)))
        self.skipped += captions.skipped
        if not self._items:
            raise UserError(f"{self.root} holds no captioned picture ({_what_was_found(self.skipped)}): "
                            f"it needs pictures ({', '.join(SUFFIXES)}) with captions, in "
                            f".txt files of the same name or in {TABLES[0]}")

    def __len__(self) -> int:
        return len(self._items)

    def key(self, index: int) -> str:
        return self._items[index][0]

    def captions_of(self, index: int) -> tuple[str, ...]:
        return self._items[index][1]

    def load(self, index: int) -> Sample:
        key, captions = self._items[index]
        return Sample(to_tensor(read_picture(self.root / key, self.image_size)), captions, key)

    def load_whole(self, index: int) -> Sample:
        key, captions = self._items[index]
        picture = _read(self.root / key, lambda picture: crops.reduced(upright(picture), self.image_size))
        return Sample(to_tensor(picture), captions, key)


def read_picture(path: Path, image_size: int) -> Image.Image:
    """A picture file as an upright RGB square of ``image_size`` pixels; raises UnreadablePicture."""
    return _read(path, partial(square, size=image_size))


def _read(path: Path, prepare: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with _open(path) as picture:
            return prepare(picture)
    except UnreadablePicture:
        raise
    except FileNotFoundError:
        raise UnreadablePicture("there is no such file") from None
    except Exception as error:  # decoders raise anything from OSError to struct.error on a damaged file
        raise UnreadablePicture(f"damaged or truncated ({error})") from error


def _find_files(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Sorted relative paths of the files under ``root``, and what is skipped; links to folders are not followed."""
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f'{root} {problem}: give a folder of captioned pictures, or "emoji", or "shapes"')
    names = sorted(
        (Path(folder) / name).relative_to(root).as_posix() for folder, _, files in os.walk(root) for name in files
    )
    readable = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]
    skipped = [(shown, "its name is not UTF-8") for name, shown in zip(names, readable, strict=True) if name != shown]
    return [name for name, shown in zip(names, readable, strict=True) if name == shown], skipped


def _check_picture(path: Path) -> None:
    try:
        with warnings.catch_warnings():  # here and not in _open, for threads share the filters
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS refuses those
            _open(path).close()
    except UnreadablePicture:
        raise
    except Exception as error:
        raise UnreadablePicture(f"not a readable picture ({error})") from error


def _open(path: Path) -> Image.Image:
    """Reads the header and refuses what should not be decoded."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        raise UnreadablePicture("not a regular file")
    if status.st_size == 0:
        raise UnreadablePicture("empty file")
    try:
        picture = Image.open(path, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise UnreadablePicture(f"not a picture in one of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise UnreadablePicture(f"more than {MAX_PIXELS} pixels") from error
    width, height = picture.size
    if not 0 < width * height <= MAX_PIXELS:
        picture.close()
        raise UnreadablePicture(f"{width}x{height} is not between 1 and {MAX_PIXELS} pixels")
    return picture


def _what_was_found(skipped: list[tuple[str, str]]) -> str:
    if not skipped:
        return "no pictures and no captions"
    return f"{len(skipped)} files were skipped, the first, {skipped[0][0]}: {skipped[0][1]}"
