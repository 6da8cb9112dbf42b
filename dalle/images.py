"""Conversions between tensors and Pillow images, and grids of images."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from dalle.files import atomic_write

MARGIN = 2


def to_uint8(images: Tensor) -> Tensor:
    """Images of any shape as uint8: floats in [0, 1] are scaled to [0, 255] and rounded, uint8 is returned as is."""
    return images if images.dtype == torch.uint8 else (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """An image [3, H, W], uint8 or float in [0, 1], as an RGB Pillow image."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB Pillow image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def square(image: Image.Image, size: int) -> Image.Image:
    """The image upright in RGB on white (see `upright`), scaled by an area filter and cropped to the centre square."""
    return ImageOps.fit(upright(image), (size, size), Image.Resampling.BOX)


def upright(image: Image.Image) -> Image.Image:
    """The image rotated by its EXIF orientation, in RGB, with transparency composited on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip instead of scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def image_grid(rows: Sequence[Sequence[Tensor]], labels: Sequence[str] = (), scale: int = 1) -> Image.Image:
    """Rows of images of equal size on white, each row under its label if it has one.

    Args:
        rows: images [3, H, W], uint8 or float in [0, 1].
        labels: one per row, empty for none; truncated to the width of the grid.
        scale: integer factor by which images are enlarged.
    """
    height, width = (scale * side for side in rows[0][0].shape[1:])
    labels = labels or [""] * len(rows)
    font = ImageFont.load_default(size=min(max(10, height // 6), 20))
    assert isinstance(font, ImageFont.FreeTypeFont)  # it is one if a size is given
    headers = [sum(font.getmetrics()) + MARGIN if label else 0 for label in labels]
    canvas_width = MARGIN + max(map(len, rows)) * (width + MARGIN)
    canvas = Image.new("RGB", (canvas_width, MARGIN + sum(headers) + len(rows) * (height + MARGIN)), "white")
    draw, top = ImageDraw.Draw(canvas), MARGIN
    for row, label, header in zip(rows, labels, headers, strict=True):
        draw.text((MARGIN, top), _fit(label, font, canvas_width - 2 * MARGIN), fill="black", font=font)
        top += header
        for j, image in enumerate(row):
            tile = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (MARGIN + j * (width + MARGIN), top))
        top += height + MARGIN
    return canvas


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text in one line, cut to a width in pixels."""
    start = " ".join(text[:width].split())  # no more characters fit than pixels; measuring a long text takes minutes
    if len(text) <= width and font.getlength(start) <= width:
        return start
    fitting = bisect_right(range(1, len(start) + 1), width, key=lambda n: font.getlength(start[:n] + "…"))
    return start[:fitting] + "…"


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG atomically; a symbolic link stays one."""
    with atomic_write(Path(path).resolve()) as temporary:
        image.save(temporary, format="PNG")
