"""A folder of captioned images as a source, searched recursively."""

import hashlib
import os
import stat
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from dalle.data import crops
from dalle.data.captions import TABLES, FolderCaptions
from dalle.data.source import Sample, Source, UnreadableImage
from dalle.errors import UserError
from dalle.images import square, to_tensor, upright

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # other formats that Pillow can parse add attack surface
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
END_BYTES = 4096  # of a file, to tell it from a replacement of the same size


def _max_pixels() -> int:
    """Pillow's own threshold for a decompression bomb, 256 MiB of RGB, or what DALLE_MAX_PIXELS allows."""
    allowed = os.environ.get("DALLE_MAX_PIXELS") or str(89_478_485)
    if not allowed.isdecimal() or int(allowed) < 1:
        raise UserError(f"DALLE_MAX_PIXELS must be a whole number, at least 1, not {allowed!r}")
    return int(allowed)


MAX_PIXELS = _max_pixels()
Image.MAX_IMAGE_PIXELS = max(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or 0)


class FolderSource(Source):
    """The captioned images under ``root``, sorted by name.

    Captions come from .txt files of the images' stems and from tables (`captions.FolderCaptions`). Opening the source
    reads all captions and the header of every image. Pixels are decoded on use, so a truncated image is only found
    then. Images are rotated by their EXIF orientation, composited on white, scaled by an area filter so that the short
    side is ``image_size``, and cropped to the centre square. Raises UserError if there is no captioned image.
    """

    def __init__(self, root: str | Path, image_size: int) -> None:
        self.root = Path(root)
        self.image_size = image_size
        files, self.skipped = _find_files(self.root)
        images = [name for name in files if name.lower().endswith(SUFFIXES)]
        captions = FolderCaptions(self.root, files, images)
        self._items: list[tuple[str, tuple[str, ...]]] = []  # (key, captions)
        for key in images:
            try:
                _check_image(self.root / key)
                if not captions.of(key):
                    raise UnreadableImage("no caption")
                self._items.append((key, captions.of(key)))
            except UnreadableImage as error:
                self.skipped.append((key, str(error)))
        self.skipped += captions.skipped
        if not self._items:
            raise UserError(f"{self.root} holds no captioned image ({_skipped_summary(self.skipped)}): "
                            f"add images ({', '.join(SUFFIXES)}) with captions, in "
                            f".txt files of the same name or in {TABLES[0]}")

    def __len__(self) -> int:
        return len(self._items)

    def key(self, index: int) -> str:
        return self._items[index][0]

    def version(self, index: int) -> str:
        """The name, size and end of the file: reading all of a large folder would take minutes."""
        path = self.root / self.key(index)
        try:
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - END_BYTES))
                return f"{self.key(index)} {size} {hashlib.sha256(file.read()).hexdigest()}"
        except OSError:
            return self.key(index)  # removed since; unreadable images are skipped when they are used

    def captions_of(self, index: int) -> tuple[str, ...]:
        return self._items[index][1]

    def load(self, index: int) -> Sample:
        key, captions = self._items[index]
        return Sample(to_tensor(read_image(self.root / key, self.image_size)), captions, key)

    def load_whole(self, index: int) -> Sample:
        key, captions = self._items[index]
        image = _read(self.root / key, lambda image: crops.reduced(upright(image), self.image_size))
        return Sample(to_tensor(image), captions, key)


def read_image(path: Path, image_size: int) -> Image.Image:
    """Reads the upright centre square of an image file, RGB, ``image_size`` pixels wide; raises UnreadableImage."""
    return _read(path, partial(square, size=image_size))


def _read(path: Path, prepare: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with _open(path) as image:
            return prepare(image)
    except UnreadableImage:
        raise
    except FileNotFoundError:
        raise UnreadableImage("there is no such file") from None
    except Exception as error:  # on a damaged file decoders raise anything from OSError to struct.error
        raise UnreadableImage(f"damaged or truncated ({error})") from error


def _find_files(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Sorted relative paths of the files under ``root``, and the skipped ones; symlinks to folders are not followed."""
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f'{root} {problem}: give a folder of captioned images, or "emoji", or "shapes"')
    names = sorted(
        (Path(folder) / name).relative_to(root).as_posix() for folder, _, files in os.walk(root) for name in files
    )
    readable = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]
    skipped = [(shown, "its name is not UTF-8") for name, shown in zip(names, readable, strict=True) if name != shown]
    return [name for name, shown in zip(names, readable, strict=True) if name == shown], skipped


def _check_image(path: Path) -> None:
    try:
        with warnings.catch_warnings():  # not in _open, because threads share the filters
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS rejects those
            _open(path).close()
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"not a readable image ({error})") from error


def _open(path: Path) -> Image.Image:
    """Reads the header; raises UnreadableImage for a file that should not be decoded."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        raise UnreadableImage("not a regular file")
    if status.st_size == 0:
        raise UnreadableImage("empty file")
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(f"not an image in one of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"more than {MAX_PIXELS} pixels: DALLE_MAX_PIXELS=N sets another limit") from error
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        image.close()
        raise UnreadableImage(
            f"{width}x{height} is not between 1 and {MAX_PIXELS} pixels: DALLE_MAX_PIXELS=N sets another limit"
        )
    return image


def _skipped_summary(skipped: list[tuple[str, str]]) -> str:
    if not skipped:
        return "no images and no captions"
    return f"{len(skipped)} files were skipped, the first, {skipped[0][0]}: {skipped[0][1]}"
