"""A folder of captioned images: what is read, what is skipped and why, and that training continues."""

import io
import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.data import open_source, split
from dalle.data.folder import FORMATS, MAX_PIXELS, read_image
from dalle.data.source import UnreadableImage, _is_held_out
from dalle.errors import UserError


def add(folder, name, caption="a caption", size=(20, 30), colour=(200, 30, 40), mode="RGB", **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def png_header(width, height):
    """A PNG that claims any size without having the pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("allowed", "says"),
    [("", "skipped"), ("168992000", "used 1"), ("168991999", "skipped"), ("a lot", "not 'a lot'"), ("0", "not '0'")],
)
def test_the_user_may_allow_larger_images(tmp_path, allowed, says):
    """10,562 x 16,000 pixels, as in a collection of clip art."""
    (tmp_path / "large.png").write_bytes(png_header(10_562, 16_000))
    (tmp_path / "large.txt").write_text("a caption")
    code = f"""
from dalle.errors import UserError
try:
    from dalle.data import open_source
    print("used", len(open_source({str(tmp_path)!r}, 32)))
except UserError as error:
    print(error)
"""
    environment = os.environ | {"DALLE_MAX_PIXELS": allowed}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert says in done.stdout


def test_reads_every_format_recursively_in_the_order_of_names(tmp_path):
    names = ["a.jpg", "B.JPEG", "c.png", "deep/er/d.webp", "e.gif", "f.bmp"]
    for name in names:
        add(tmp_path, name, caption=f"  image\t of  {name} \r\n\n second {name}\n")
    source = open_source(str(tmp_path), 16)
    assert [sample.key for sample in source] == sorted(names)
    assert source.skipped == []
    for index, sample in enumerate(source):
        assert sample.image.dtype == torch.uint8 and sample.image.shape == (3, 16, 16)
        assert sample.caption == source.caption(index) == f"image of {sample.key}"
        assert sample.captions == source.captions_of(index) == (sample.caption, f"second {sample.key}")
        assert (sample.image.float().mean((1, 2)) - torch.tensor([200.0, 30.0, 40.0])).abs().max() < 6
    assert list(source.captions()) == [caption for sample in source for caption in sample.captions]


def test_what_cannot_be_used_is_skipped_with_its_reason(tmp_path):
    add(tmp_path, "good.png")
    add(tmp_path, "lonely.png", caption=None)
    add(tmp_path, "blank.png", caption=" \n\t ")
    add(tmp_path, "long.png", caption="a" * 70_000)
    (tmp_path / "orphan.txt").write_text("no image here")
    for name, content in {
        "text.jpg": b"this is no image",
        "zero.jpg": b"",
        "bomb.png": png_header(100_000, 100_000),
        "huge.png": png_header(MAX_PIXELS // 9_000 + 1, 9_000),
        "flat.png": png_header(0, 7),
        "tiff.png": b"II*\0" + bytes(100),
    }.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    add(tmp_path, "latin.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkdir(tmp_path / "folder.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")

    source = open_source(str(tmp_path), 8)
    reasons = dict(source.skipped)
    assert [sample.key for sample in source] == ["good.png"]
    assert len(reasons) == len(source.skipped)
    for name, reason in {
        "lonely.png": "no caption",
        "blank.png": "no caption",
        "blank.txt": "empty",
        "long.png": "no caption",
        "long.txt": "longer than",
        "orphan.txt": "without an image",
        "text.jpg": "not an image",
        "zero.jpg": "empty file",
        "bomb.png": f"{MAX_PIXELS} pixels",
        "huge.png": f"{MAX_PIXELS} pixels",
        "flat.png": "",
        "tiff.png": "not an image",
        "latin.png": "no caption",
        "latin.txt": "not UTF-8",
        "pipe.jpg": "not a regular file",
        "dangling.jpg": "",
    }.items():
        assert reason in reasons.pop(name), name
    assert reasons == {}


def test_an_image_that_fails_later_is_left_out_and_listed_once(tmp_path):
    for i in range(5):
        add(tmp_path, f"{i}.png", caption=f"number {i}", colour=(40 * i, 0, 0))
    source = open_source(str(tmp_path), 8)
    for i in (1, 2):
        path = tmp_path / f"{i}.png"
        path.write_bytes(path.read_bytes()[:60])
    (tmp_path / "4.png").unlink()
    for _ in range(2):
        assert [(i, sample.key) for i, sample in source.readable()] == [(0, "0.png"), (3, "3.png")]
        assert [i for i, _ in source.readable([3, 4, 2, 3])] == [3, 3]
    assert source[3].caption == "number 3"
    assert sorted(name for name, _ in source.skipped) == ["1.png", "2.png", "4.png"]
    with pytest.raises(UnreadableImage, match="truncated"):
        source[1]
    with pytest.raises(UnreadableImage, match="no such file"):
        source[-1]
    with pytest.raises(IndexError):
        source[5]


def test_a_split_shares_the_list_of_skipped_images(tmp_path):
    for i in range(60):
        add(tmp_path, f"{i}.png")
    source = open_source(str(tmp_path), 8)
    held_out = split(source, "heldout")
    own = {held_out.key(i) for i in range(len(held_out))}
    assert 2 <= len(own) < 20  # of the 60 fixed names
    (tmp_path / held_out.key(0)).write_bytes(b"")
    assert {sample.key for _, sample in held_out.readable()} == own - {held_out.key(0)}
    assert source.skipped and held_out.skipped is source.skipped


def test_split_depends_on_nothing_but_the_names(tmp_path):
    for i in range(200):
        add(tmp_path, f"{i}.png", size=(1, 1))
    source = open_source(str(tmp_path), 8)
    train, held_out = split(source, "train"), split(source, "heldout")
    keys = [{part.key(i) for i in range(len(part))} for part in (train, held_out)]
    assert keys[0] | keys[1] == {f"{i}.png" for i in range(200)} and not keys[0] & keys[1]
    assert 2 <= len(held_out) <= 25
    for i in range(100):
        (tmp_path / f"{i}.png").unlink()
    fewer = split(open_source(str(tmp_path), 8), "heldout")
    assert {fewer.key(i) for i in range(len(fewer))} == keys[1] & {f"{i}.png" for i in range(100, 200)}
    with pytest.raises(UserError, match="neither"):
        split(source, "test")


def test_short_side_is_scaled_and_the_centre_cropped(tmp_path):
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60, 0] = np.repeat(np.arange(20), 2) * 10 + 5  # the centre square, in stripes two pixels wide
    image[:, :20] = image[:, 60:] = 255
    Image.fromarray(image).save(tmp_path / "wide.png")
    Image.fromarray(image.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    expected = np.zeros((20, 20, 3), np.uint8)
    expected[..., 0] = np.arange(20) * 10 + 5  # the mean over 2x2 pixels: an area filter
    assert np.array_equal(np.array(read_image(tmp_path / "wide.png", 20)), expected)
    assert np.array_equal(np.array(read_image(tmp_path / "tall.png", 20)), expected.transpose(1, 0, 2))
    for size in [(1, 1), (1, 3000), (3000, 1), (7, 5)]:
        add(tmp_path, "odd.png", size=size)
        assert read_image(tmp_path / "odd.png", 16).getcolors() == [(256, (200, 30, 40))]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, seed):
    upright = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    stored = {  # EXIF: which side of the stored image is up
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.array(read_image(tmp_path / "a.png", 16)), upright)


def test_transparency_is_composited_on_white(tmp_path):
    for mode, colour in {"RGBA": (200, 0, 0, 51), "LA": (100, 51)}.items():
        add(tmp_path, f"{mode}.png", mode=mode, colour=colour)
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "P.png", transparency=1)
    read = {name: read_image(tmp_path / f"{name}.png", 8).getpixel((3, 3)) for name in ("RGBA", "LA", "P")}
    assert read == {"RGBA": (244, 204, 204), "LA": (224, 224, 224), "P": (255, 255, 255)}


def test_other_modes(tmp_path):
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", (9, 9), 1).save(tmp_path / "bit.png")
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    assert read_image(tmp_path / "deep.png", 8).getpixel((3, 3)) == (156, 156, 156)
    assert read_image(tmp_path / "bit.png", 8).getpixel((3, 3)) == (255, 255, 255)
    red, green, blue = read_image(tmp_path / "print.jpg", 8).getpixel((3, 3))
    assert red > 200 and green < 50 and blue < 50


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_rejected_without_other_errors(tmp_path, kind, seed):
    rng = random.Random(seed)
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 60).convert("RGB").save(buffer, kind)
    intact, path = buffer.getvalue(), tmp_path / "damaged.png"
    for _ in range(150):
        data = bytearray(intact[: rng.choice([len(intact), rng.randrange(len(intact))])])
        for _ in range(rng.randrange(8)):
            if data:
                data[rng.choice([rng.randrange(len(data)), rng.randrange(min(64, len(data)))])] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert read_image(path, 8).size == (8, 8)
        except UnreadableImage as error:
            assert str(error)


def test_a_folder_without_captioned_images_is_rejected(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    add(tmp_path / "bare", "a.png", caption=None)
    for spec, sentence in {
        str(tmp_path / "missing"): "does not exist",
        str(tmp_path / "file"): "is not a folder",
        str(tmp_path / "empty"): "no images and no captions.*same name",
        str(tmp_path / "bare"): "1 files were skipped, the first, a.png: no caption",
    }.items():
        with pytest.raises(UserError, match=sentence) as caught:
            open_source(spec, 16)
        assert spec in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="image size 0"):
        open_source(str(tmp_path), 0)
    name = next(f"{i}.png" for i in range(1000) if _is_held_out(f"{i}.png"))
    add(tmp_path / "one", name)
    only = open_source(str(tmp_path / "one"), 16)
    assert len(split(only, "heldout")) == 1
    with pytest.raises(UserError, match="training split"):
        split(only, "train")
