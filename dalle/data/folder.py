"""A folder of pictures, searched recursively, each with its caption in a text file of the same stem."""

import os
import stat
import warnings
from pathlib import Path

from PIL import Image

from dalle.data.source import Sample, Source, UnreadablePicture
from dalle.errors import UserError
from dalle.images import square, to_tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # everything else Pillow can parse is attack surface
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb: 256 MiB of RGB
MAX_CAPTION_BYTES = 65_536


class FolderSource(Source):
    """The captioned pictures under ``root``, in the order of their names.

    Opening reads every caption and every picture's header; pixels are decoded on use, so a truncated picture is found
    then. A picture is turned upright by its EXIF orientation, composited on white, scaled by an area filter until its
    short side is ``image_size``, and cropped to the centre square. The whitespace in a caption is collapsed to single
    spaces.
    """

    def __init__(self, root: str | Path, image_size: int):
        self.root = Path(root)
        self.image_size = image_size
        self.skipped = []
        self._items: list[tuple[str, tuple[str, ...]]] = []  # (key, captions)
        pictures, texts = _find_files(self.root)
        for key in pictures:
            try:
                _check_picture(self.root / key)
                self._items.append((key, (_read_caption(self.root / key, texts),)))
            except UnreadablePicture as error:
                self.skipped.append((key, str(error)))
        stems = {os.path.splitext(key)[0] for key in pictures}
        lonely = [text for text in texts if os.path.splitext(text)[0] not in stems]
        self.skipped += [(text, "caption without a picture") for text in lonely]
        if not self._items:
            raise UserError(f"{self.root} holds no captioned picture ({_what_was_found(self.skipped)}): "
                            f"it needs pictures ({', '.join(SUFFIXES)}) with captions in .txt files of the same name")

    def __len__(self) -> int:
        return len(self._items)

    def key(self, index: int) -> str:
        return self._items[index][0]

    def captions_of(self, index: int) -> tuple[str, ...]:
        return self._items[index][1]

    def load(self, index: int) -> Sample:
        key, captions = self._items[index]
        return Sample(to_tensor(read_picture(self.root / key, self.image_size)), captions, key)


def read_picture(path: Path, image_size: int) -> Image.Image:
    """A picture file as an upright RGB square of ``image_size`` pixels; raises UnreadablePicture."""
    try:
        with _open(path) as picture:
            return square(picture, image_size)
    except UnreadablePicture:
        raise
    except FileNotFoundError:
        raise UnreadablePicture("there is no such file") from None
    except Exception as error:  # decoders raise anything from OSError to struct.error on a damaged file
        raise UnreadablePicture(f"damaged or truncated ({error})") from error


def _find_files(root: Path) -> tuple[list[str], dict[str, None]]:
    """Sorted relative paths of the pictures and of the captions under ``root``; links to folders are not followed."""
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f'{root} {problem}: give a folder of captioned pictures, or "emoji", or "shapes"')
    names = sorted(
        (Path(folder) / name).relative_to(root).as_posix() for folder, _, files in os.walk(root) for name in files
    )
    pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
    return pictures, dict.fromkeys(name for name in names if name.lower().endswith(".txt"))


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


def _read_caption(picture: Path, texts: dict[str, None]) -> str:
    path = picture.with_suffix(".txt")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadablePicture("its caption is not a regular file")
        if path.stat().st_size > MAX_CAPTION_BYTES:
            raise UnreadablePicture(f"its caption is longer than {MAX_CAPTION_BYTES} bytes")
        caption = " ".join(path.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        raise UnreadablePicture("no caption") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UnreadablePicture(f"its caption cannot be read ({error})") from error
    if not caption:
        raise UnreadablePicture("its caption is empty")
    return caption


def _what_was_found(skipped: list[tuple[str, str]]) -> str:
    if not skipped:
        return "no pictures and no captions"
    return f"{len(skipped)} files were skipped, the first, {skipped[0][0]}: {skipped[0][1]}"
