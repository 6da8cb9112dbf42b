"""The colour-emoji font as a source: every emoji in the font, captioned with its Unicode name."""

import functools
import shutil
import subprocess
from pathlib import Path

import emoji
from PIL import Image, ImageDraw, ImageFont, features

from dalle.data.source import Part, Sample, Source, Subset
from dalle.errors import UserError
from dalle.images import to_tensor

FONT_SIZE = 109  # the only size at which the font's bitmaps exist
GLYPH_WIDTH, GLYPH_HEIGHT = 136, 128
FONT_ADVICE = "install the system package fonts-noto-color-emoji, or give --font PATH to NotoColorEmoji.ttf"
WELL_KNOWN_FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
)
HELD_OUT = Path(__file__).with_name("emoji_heldout.txt")


class EmojiSource(Source):
    """About 3,800 images: the fully qualified emoji of Unicode, except those that ``font`` lacks.

    The glyph (136x128) is rendered on white, scaled to fill the width of the image, and centred. The caption is the
    English Unicode name, such as "woman running dark skin tone". The held-out split is the 200 captions in
    emoji_heldout.txt. Each combines a person, a job and a skin tone that occur in the training split, but not together.
    Raises UserError if the font is missing, has no coloured emoji, or Pillow lacks raqm.
    """

    def __init__(self, image_size: int, font: str | None = None) -> None:
        self.image_size = image_size
        self.font = find_font(font)
        _check_raqm()
        self.skipped = []
        self._emoji: list[str] = []
        for text, data in emoji.EMOJI_DATA.items():
            if data["status"] > emoji.STATUS["fully_qualified"]:
                continue  # a shorter spelling of the same emoji
            if _has_glyph(text, self.font):
                self._emoji.append(text)
            else:
                self.skipped.append((_code_points(text), "not in the font"))

    def __len__(self) -> int:
        return len(self._emoji)

    def key(self, index: int) -> str:
        return _code_points(self._emoji[index])

    def version(self, index: int) -> str:
        return f"{self.key(index)} {Path(self.font).stat().st_size}"  # other releases of the font draw other emoji

    def captions_of(self, index: int) -> tuple[str]:
        return (emoji.EMOJI_DATA[self._emoji[index]]["en"].strip(":").replace("_", " ").lower(),)

    def load(self, index: int) -> Sample:
        image = render(self._emoji[index], self.font, self.image_size)
        return Sample(to_tensor(image), self.captions_of(index), self.key(index))

    def split(self, part: Part) -> Subset:
        held_out = held_out_captions()
        return Subset(self, [i for i in range(len(self)) if (self.caption(i) in held_out) == (part == "heldout")])


@functools.cache
def held_out_captions() -> frozenset[str]:
    """The 200 captions of the held-out split."""
    return frozenset(HELD_OUT.read_text(encoding="utf-8").splitlines())


def render(text: str, font: str, image_size: int) -> Image.Image:
    """Renders one emoji on white, RGB, as a square of ``image_size`` pixels."""
    return _glyph(text, font).resize((image_size, image_size), Image.Resampling.BOX)


def find_font(path: str | None = None) -> str:
    """The path of the colour-emoji font: ``path`` if given, else from fontconfig, else from the usual locations."""
    if path is not None:
        _check_colour(path)
        return path
    for candidate in (_ask_fontconfig(), *WELL_KNOWN_FONTS):
        if candidate and Path(candidate).is_file():
            return candidate
    raise UserError(f"no colour-emoji font found: {FONT_ADVICE}")


def _ask_fontconfig() -> str | None:
    if shutil.which("fc-match") is None:
        return None
    query = ["fc-match", "--format=%{family}\n%{file}", "Noto Color Emoji"]
    family, _, path = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")
    return path if "Noto Color Emoji" in family else None  # fc-match falls back to another font


@functools.cache
def _open_font(path: str) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(path, FONT_SIZE)  # laid out by raqm if Pillow has it
    except OSError as error:
        raise UserError(f"{path} is not a font with bitmaps of {FONT_SIZE} px ({error}): {FONT_ADVICE}") from None


def _check_colour(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"there is no font file {path}: {FONT_ADVICE}")
    red, green, blue = _glyph("\N{GRINNING FACE}", path).split()
    if red.tobytes() == green.tobytes() == blue.tobytes():
        raise UserError(f"{path} has no coloured emoji: {FONT_ADVICE}")


def _glyph(text: str, font: str) -> Image.Image:
    """One emoji at the font's own resolution, centred in a square."""
    canvas = Image.new("RGB", (GLYPH_WIDTH, GLYPH_WIDTH), "white")
    top = (GLYPH_WIDTH - GLYPH_HEIGHT) // 2
    ImageDraw.Draw(canvas).text((0, top), text, font=_open_font(font), embedded_color=True)
    return canvas


def _has_glyph(text: str, font: str) -> bool:
    """False for a sequence that is rendered as several glyphs, as nothing, or as a placeholder."""
    return _open_font(font).getlength(text) <= GLYPH_WIDTH and _glyph(text, font).tobytes() not in _placeholders(font)


@functools.cache
def _placeholders(font: str) -> frozenset[bytes]:
    """Renderings of nothing, of a code point that will never be assigned, and of the flag of no region."""
    return frozenset(_glyph(text, font).tobytes() for text in ("", "\U0010ffff", "\U0001f1ff\U0001f1ff"))


def _check_raqm() -> None:
    if not features.check("raqm"):
        raise UserError(
            "this Pillow lacks raqm and would render emoji sequences wrong: install the system package libfribidi0 and "
            "a wheel of Pillow, which loads it (pip install --force-reinstall pillow), or libraqm0 for your own build"
        )


def _code_points(text: str) -> str:
    return "-".join(f"{ord(c):x}" for c in text)
