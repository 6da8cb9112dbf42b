"""Sources of captioned pictures: a folder, the colour-emoji font, drawn shapes."""

from dalle.data.source import Part, Sample, Source, UnreadablePicture
from dalle.errors import UserError
from dalle.extras import extras

__all__ = ["Sample", "Source", "UnreadablePicture", "open_source", "split"]


def open_source(spec: str, image_size: int, *, font: str | None = None) -> Source:
    """Opens the pictures that ``spec`` names, as squares of ``image_size`` pixels.

    spec: "emoji" (drawn from the colour-emoji font, or from the file ``font``); "shapes" or "shapes:N" (N drawn scenes
    of the whole grammar); "shapes-simple" or "shapes-simple:N" (one object each); anything else is a folder of pictures
    with captions beside them (a folder called emoji is "./emoji"). Raises UserError.
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
    """The training part or the held-out part of a source, the same ones every time.

    Drawn shapes hold out combinations of colour and shape, the emoji 200 listed combinations of person, job and skin
    tone, other sources about 5 % of their pictures, by a hash of the name.
    The held-out part of a very small folder can be empty; an empty training part is a UserError.
    """
    if part not in ("train", "heldout"):
        raise UserError(f'part {part!r} is neither "train" nor "heldout"')
    view = source.split(part)
    if part == "train" and len(view) == 0:
        raise UserError(f"none of the {len(source)} pictures falls into the training part; add pictures")
    return view


def _count(spec: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"{spec!r}: the number of drawn scenes must be a positive integer, as in shapes:20000")
    return int(text)
