"""The colour-emoji font as a source. Rendering needs the font and raqm; errors without them are always tested."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor

import emoji
import pytest
import torch
from PIL import ImageFont, features

from dalle.cli import demo
from dalle.data import emoji as emoji_source
from dalle.data import open_source, split
from dalle.errors import UserError
from dalle.images import to_tensor


@pytest.fixture(scope="module")
def source():
    try:
        return open_source("emoji", 32)
    except UserError as error:
        pytest.skip(str(error))


def index_of(source, text):
    return [source.key(i) for i in range(len(source))].index("-".join(f"{ord(c):x}" for c in text))


@pytest.mark.optional
def test_about_3800_images_with_their_names(source):
    assert 3_500 < len(source) < 4_500
    captions = list(source.captions())
    assert len(set(captions)) > 0.99 * len(captions)
    assert {*demo.PROMPTS, demo.COMPLETION, *demo.HELD_OUT} <= set(captions)
    assert all(c == c.lower() and c.strip() and ":" not in c[:1] + c[-1:] and "_" not in c for c in captions)
    for text, caption in {
        "😀": "grinning face",
        "🇳🇴": "norway",
        "👩🏿‍🚀": "woman astronaut dark skin tone",
        "7️⃣": "keycap 7",
        "🏴󠁧󠁢󠁷󠁬󠁳󠁿": "wales",
    }.items():
        index = index_of(source, text)
        assert source.caption(index) == source[index].caption == caption


@pytest.mark.optional
def test_the_whole_glyph_fills_the_width_and_is_centred(source):
    def rendered(text):
        return to_tensor(emoji_source.render(text, source.font, emoji_source.GLYPH_WIDTH))

    square = rendered("🟥")  # symmetric, with a margin
    ink = (square.float().mean(0) < 250).nonzero()
    (top, left), (bottom, right) = ink.min(0).values.tolist(), ink.max(0).values.tolist()
    assert abs((top + bottom) / 2 - 67.5) <= 2 and abs((left + right) / 2 - 67.5) <= 2
    assert right - left > 100 and bottom - top > 100
    red, green, blue = square[:, 68, 68].tolist()
    assert red > 180 and green < 100 and blue < 100
    for text in "😀🐍🏔🗼🦒":  # four rows above and below the 128 of the glyph stay white
        assert (rendered(text)[:, :4] == 255).all() and (rendered(text)[:, -4:] == 255).all()


@pytest.mark.optional
def test_every_image_has_something_in_it_and_nearly_all_differ(source):
    images = [source[i].image for i in range(len(source))]
    assert all(p.dtype == torch.uint8 and p.shape == (3, 32, 32) for p in images)
    assert all((p < 250).float().mean() > 0.005 for p in images)
    different = len({hashlib.sha1(p.numpy().tobytes()).digest() for p in images})
    assert different > 0.98 * len(images)  # some territories share a flag


@pytest.mark.optional
def test_sequences_the_font_lacks_are_left_out_and_listed(source):
    qualified = {text for text, data in emoji.EMOJI_DATA.items() if data["status"] <= emoji.STATUS["fully_qualified"]}
    listed = {name for name, _ in source.skipped}
    assert len(listed) == len(source.skipped)
    keys = {source.key(i) for i in range(len(source))}
    assert keys | listed == {"-".join(f"{ord(c):x}" for c in text) for text in qualified} and not keys & listed
    for text in ("\U0010ffff", "😀😀", "👩\u200d😀", "🇿🇿", "\u200d", " "):
        assert not emoji_source._has_glyph(text, source.font), text


@pytest.mark.optional
def test_held_out_captions_recombine_those_of_the_training_split(source):
    train, held_out = split(source, "train"), split(source, "heldout")
    assert len(train) + len(held_out) == len(source)
    listed = emoji_source.held_out_captions()
    assert set(held_out.captions()) == listed and len(held_out) == len(listed) == 200
    known = set(train.captions())
    assert not known & listed
    assert {word for caption in listed for word in caption.split()} <= {w for caption in known for w in caption.split()}
    for caption in listed:  # the same person with the same job, in another skin tone
        person = re.match(r"(.*?) (medium-light|medium-dark|light|medium|dark) skin tone$", caption)[1]
        assert re.match("(man|woman|person) .", person) and person in known
        assert any(other.startswith(person) and "skin tone" in other for other in known)


@pytest.mark.optional
def test_no_held_out_image_is_in_the_training_split(source):
    train, held_out = (
        {part.load(i).image.numpy().tobytes() for i in range(len(part))}
        for part in (split(source, "train"), split(source, "heldout"))
    )
    assert not train & held_out


@pytest.mark.optional
def test_rendering_in_threads_gives_the_same_images(source, seed):
    indices = torch.randperm(len(source))[:200].tolist()
    serial = [source[i].image for i in indices]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda i: source[i].image, indices))
    assert all(torch.equal(a, b) for a, b in zip(serial, threaded))


def test_without_raqm_the_font_is_refused(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name != "raqm")
    monkeypatch.setattr(emoji_source, "find_font", lambda path: path)
    with pytest.raises(UserError, match=r"raqm.*libfribidi0.*libraqm0"):
        open_source("emoji", 32)


def test_without_a_font_the_package_is_named(monkeypatch):
    monkeypatch.setattr(emoji_source, "WELL_KNOWN_FONTS", ("/nowhere/NotoColorEmoji.ttf",))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"fonts-noto-color-emoji.*--font PATH"):
        open_source("emoji", 32)


@pytest.mark.parametrize("kind", ["missing", "folder", "not a font", "without colour"])
def test_an_unusable_font_is_rejected(monkeypatch, tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "font.ttf"
    if kind == "not a font":
        path.write_bytes(b"not a font")
    if kind == "without colour":
        path.write_bytes(ImageFont.load_default(12).path.getvalue())  # Pillow's outline font
    with pytest.raises(UserError, match="--font PATH") as caught:
        open_source("emoji", 32, font=str(path))
    assert str(path) in str(caught.value)
