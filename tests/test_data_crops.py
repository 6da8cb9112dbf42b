"""Crops, checked on images whose pixel values encode their positions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle.data import open_source
from dalle.data.crops import dvae_crop, prior_crop, reduced
from dalle.training import loader
from dalle.training.loader import ImageLoader, batch_indices
from dalle.training.tokens import _crops


def coordinates(height, width):
    """An image [3, height, width] whose red channel is the column and whose green channel is the row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8)


def extent(crop, size):
    """Position and scale of a crop, from its pixels: left, top, source pixels per pixel."""
    x, y = crop[0].double(), crop[1].double()
    assert (x == x[:1]).all() and (y == y[:, :1]).all()
    steps = [(line[-1] - line[0]).item() / (size - 1) for line in (x[0], y[:, 0])]
    assert abs(steps[0] - steps[1]) < 2 / (size - 1)  # not distorted; a pixel is known to half a level at both ends
    return x[0, 0].item(), y[0, 0].item(), sum(steps) / 2


def offsets(crop, image, size, count, seed):
    for i in range(count):
        square = crop(image, size, np.random.default_rng((seed, i)))
        assert square.shape == (3, size, size) and square.dtype == torch.uint8 and square.is_contiguous()
        yield extent(square, size)


@pytest.mark.parametrize(("crop", "eighths"), [(dvae_crop, (9, 12)), (prior_crop, (8, 9))])
@pytest.mark.parametrize("transposed", [False, True])
def test_scales_and_places_are_the_published_ones(crop, eighths, transposed, seed):
    size, side, long = 64, 96, 250
    image = coordinates(long, side) if transposed else coordinates(side, long)
    found = torch.tensor(list(offsets(crop, image, size, 400, seed)))
    across, along, steps = (found[:, i] for i in ((1, 0, 2) if not transposed else (0, 1, 2)))
    low, high = (side / (size * n / 8) for n in reversed(eighths))  # source pixels per pixel
    margin = 1.5 / (size - 1)
    assert steps.min() > low - margin and steps.max() < high + margin
    assert steps.max() - steps.min() > 0.7 * (high - low)
    assert across.min() >= 0 and (across + steps * (size - 1)).max() <= side - 1 + 1
    assert across.max() - across.min() > 0.5 * (side - low * size)
    slack, freedom = long - side, side - low * size  # the second is what the second, smaller crop may add
    first, last = (0, slack) if crop is dvae_crop else (3 * slack // 8, 5 * slack // 8 - 1)
    assert along.min() >= first - 1 and along.max() <= last + freedom + 1
    assert along.max() - along.min() > 0.8 * (last - first)


@settings(max_examples=100)
@given(
    height=st.integers(1, 120), width=st.integers(1, 120), size=st.integers(1, 70), seed=st.integers(0, 2**32),
    crop=st.sampled_from([dvae_crop, prior_crop]),
)  # fmt: skip
def test_any_image_gives_a_square_of_its_own_pixels(height, width, size, seed, crop):
    square = crop(coordinates(height, width), size, np.random.default_rng(seed))
    assert square.shape == (3, size, size)
    x, y = square[0].long(), square[1].long()
    assert (x == x[:1]).all() and (y == y[:, :1]).all() and (x.diff(dim=1) >= 0).all() and (y.diff(dim=0) >= 0).all()
    assert x.max() < width and y.max() < height and square[2].max() == 0
    assert torch.equal(square, crop(coordinates(height, width), size, np.random.default_rng(seed)))


def test_a_square_of_the_models_side_is_unchanged(seed):
    image = torch.randint(256, (3, 33, 33), dtype=torch.uint8)
    for crop in (dvae_crop, prior_crop):
        assert torch.equal(crop(image, 33, np.random.default_rng(seed)), image)


def test_a_crop_is_the_mean_of_the_area_it_covers(seed):
    """Every other crop is the whole image at half its size: the means over 2x2 pixels."""
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    means = image.double().unflatten(1, (8, 2)).unflatten(3, (8, 2)).mean((2, 4))
    for i in range(50):
        crop = prior_crop(image, 8, np.random.default_rng((seed, i))).double()
        if (crop - means).abs().max() <= 1:  # Pillow rounds twice, after the rows and after the columns
            break
    else:
        pytest.fail("no crop was the whole image at half its size")


def test_reduced_keeps_the_whole_image():
    for width, height in [(1000, 500), (500, 1000), (4000, 37), (1, 3000)]:
        small = reduced(Image.new("RGB", (width, height), (9, 8, 7)), 64)
        assert min(small.size) == min(96, width, height)
        assert abs(small.width / small.height / (width / height) - 1) < 0.02
        assert small.getcolors(1 << 22) == [(small.width * small.height, (9, 8, 7))]
    image = Image.new("RGB", (96, 200))
    assert reduced(image, 64) is image


@pytest.fixture
def folder(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for i, shape in enumerate([(40, 90), (90, 40), (16, 16), (9, 20), (64, 64), (100, 300)]):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"image {i}\nsame image {i}")
    return open_source(str(tmp_path), 16)


def test_batches_of_crops_are_a_function_of_seed_and_step(folder, monkeypatch):
    def batches(steps, cache_bytes=loader.CACHE_BYTES, seed=3):
        monkeypatch.setattr(loader, "CACHE_BYTES", cache_bytes)
        images = ImageLoader(folder, 4, seed, dvae_crop)
        return {step: images.batch(step).images for step in steps}

    expected = batches(range(8))
    for cache_bytes in (0, 10_000, loader.CACHE_BYTES):  # nothing cached, some images, all
        for step, batch in batches([5, 2, 3, 7, 7], cache_bytes).items():
            assert torch.equal(batch, expected[step])
    assert not torch.equal(batches([0], seed=4)[0], expected[0])
    seen = {}
    for step, batch in expected.items():
        for index, square in zip(batch_indices(6, 4, 3, step).tolist(), batch, strict=True):
            seen.setdefault(index, []).append(square)
    assert not torch.equal(seen[0][0], seen[0][1])  # a new crop in every epoch
    assert all(torch.equal(crop, folder[2].image) for crop in seen[2])  # an image of the model's size


def test_whole_images_that_cannot_be_read_are_left_out(folder):
    (folder.root / "1.png").write_bytes(b"")
    shapes = {i: tuple(sample.image.shape[1:]) for i, sample in folder.readable(whole=True)}
    assert list(shapes) == [0, 2, 3, 4, 5] and shapes[2] == (16, 16) and shapes[0] != (16, 16)
    assert folder.skipped == [("1.png", "empty file")]


def test_rendered_images_stay_exact_under_crops():
    source = open_source("shapes:30", 32)
    exact, cropped = (ImageLoader(source, 30, 0, crop).batch(0).images for crop in (None, dvae_crop))
    assert torch.equal(exact, cropped)


def test_crops_of_an_image_for_the_prior(folder):
    assert [torch.equal(_crops(folder[i], i, 1, 16)[0].image, folder[i].image) for i in range(6)] == [True] * 6
    for i in range(6):
        whole = folder.load_whole(i).image
        squares = _crops(folder.load_whole(i), i, 5, 16)
        generators = [np.random.default_rng((n, i)) for n in range(1 if i == 2 else 5)]
        assert len(squares) == len(generators)
        for square, rng in zip(squares, generators, strict=True):
            assert square.key == folder.key(i) and square.captions == (f"image {i}", f"same image {i}")
            assert torch.equal(square.image, prior_crop(whole, 16, rng))
    assert len({sample.image.numpy().tobytes() for sample in _crops(folder.load_whole(0), 0, 5, 16)}) > 1
