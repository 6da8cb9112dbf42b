"""Sources of captioned images: a folder, the colour-emoji font, or synthetic shapes."""

from dalle.data.source import Part, Sample, Source, UnreadableImage
from dalle.errors import UserError
from dalle.extras import extras

__all__ = ["Sample", "Source", "UnreadableImage", "open_source", "split"]

MAX_SCENES = 10_000_000


def open_source(spec: str, image_size: int, *, font: str | None = None) -> Source:
    """Opens a source of captioned images.

    Args:
        spec: "emoji" (rendered from the colour-emoji font); "shapes" or "shapes:N" (N scenes of the whole grammar);
            "shapes-simple" or "shapes-simple:N" (scenes of one object); anything else is a folder of images with
            captions (a folder called emoji is "./emoji").
        image_size: side of the square images, in pixels.
        font: path of the colour-emoji font, if the system's is not found.

    Raises:
        UserError: the folder or font is missing, holds nothing usable, or ``spec`` or ``image_size`` is invalid.
    """
    if image_size < 1:
        raise UserError(f"image size {image_size} is not positive")
    name, _, count = spec.partition(":")
    if name in ("shapes", "shapes-simple"):
        from dalle.data.shapes import ShapesSource

        return ShapesSource(image_size, _count(spec, count) if ":" in spec else None, simple=name == "shapes-simple")
    if spec == "emoji":
        with extras():
            from dalle.data.emoji import EmojiSource

        return EmojiSource(image_size, font)
    from dalle.data.folder import FolderSource

    return FolderSource(spec, image_size)


def split(source: Source, part: Part) -> Source:
    """The training split ("train") or the held-out split ("heldout") of a source, always the same.

    Shapes hold out combinations of colour and shape, emoji 200 listed combinations of person, job and skin tone, and
    folders about 5 % of their images, by a hash of the name. The held-out split of a very small folder can be empty.
    Raises UserError if the training split is empty.
    """
    if part not in ("train", "heldout"):
        raise UserError(f'part {part!r} is neither "train" nor "heldout"')
    view = source.split(part)
    if part == "train" and len(view) == 0:
        raise UserError(f"none of the {len(source)} images falls into the training split: add images")
    return view


def _count(spec: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 20 or not 1 <= int(text) <= MAX_SCENES:
        raise UserError(
            f"{spec!r}: the number of scenes must be a positive integer up to {MAX_SCENES:,}, as in shapes:20000"
        )
    return int(text)
