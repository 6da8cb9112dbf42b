"""Between tensors and Pillow, and grids of pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from dalle.files import replacing

MARGIN = 2


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures as uint8: those in [0, 1] are scaled to [0, 255] and rounded, uint8 stays as it is."""
    return pictures if pictures.dtype == torch.uint8 else (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(picture: Tensor) -> Image.Image:
    """A picture [3, H, W], uint8 or float in [0, 1], as an RGB image."""
    return Image.fromarray(to_uint8(picture).permute(1, 2, 0).cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def square(image: Image.Image, size: int) -> Image.Image:
    """The image upright by its EXIF data, on white, scaled by an area filter and cropped to the centre square."""
    return ImageOps.fit(upright(image), (size, size), Image.Resampling.BOX)


def upright(image: Image.Image) -> Image.Image:
    """The image upright by its EXIF data, in RGB on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip instead of scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def grid(rows: Sequence[Sequence[Tensor]], labels: Sequence[str] = (), scale: int = 1) -> Image.Image:
    """Rows of equally large pictures on white, each under its label if it has one.

    Args:
        rows: pictures [3, H, W], uint8 or float in [0, 1].
        labels: one for each row, empty where there is none; cut to the width of the grid.
        scale: whole number by which pictures are enlarged.
    """
    height, width = (scale * side for side in rows[0][0].shape[1:])
    labels = labels or [""] * len(rows)
    font = ImageFont.load_default(size=min(max(10, height // 6), 20))
    assert isinstance(font, ImageFont.FreeTypeFont)  # which it is where a size is given
    headers = [sum(font.getmetrics()) + MARGIN if label else 0 for label in labels]
    canvas_width = MARGIN + max(map(len, rows)) * (width + MARGIN)
    canvas = Image.new("RGB", (canvas_width, MARGIN + sum(headers) + len(rows) * (height + MARGIN)), "white")
    draw, top = ImageDraw.Draw(canvas), MARGIN
    for row, label, header in zip(rows, labels, headers, strict=True):
        draw.text((MARGIN, top), _fit(label, font, canvas_width - 2 * MARGIN), fill="black", font=font)
        top += header
        for j, picture in enumerate(row):
            image = to_pil(picture).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(image, (MARGIN + j * (width + MARGIN), top))
        top += height + MARGIN
    return canvas


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def save(image: Image.Image, path: Path) -> None:
    """Writes a PNG, atomically."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
