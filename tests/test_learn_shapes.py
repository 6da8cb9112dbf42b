"""The measurement of learning: its interval, its scenes, its counts, and the whole on a model of toy size."""

import json
import math
import random

import learn_shapes
import pytest
import torch
from PIL import Image

from dalle import DiscreteVAEConfig, PriorConfig, UserError
from dalle.data.shapes import HELD_OUT, SEEN, caption, draw
from dalle.data.shapes_parser import parse
from dalle.dvae import PRESETS as DVAE_PRESETS
from dalle.prior import PRESETS as PRIOR_PRESETS


@pytest.mark.parametrize("count", [1, 7, 324])
def test_the_ends_of_the_interval_are_where_the_score_test_turns(count):
    for right in {0, 1, count // 2, count}:
        low, high = learn_shapes.wilson(right, count)
        share = right / count
        assert 0 <= low <= share <= high <= 1
        for end in (low, high):
            # |share - p| = z sqrt(p (1 - p) / n) defines the interval; 0 and 1 solve it where all are wrong or right.
            assert math.isclose(abs(share - end), 1.959964 * math.sqrt(end * (1 - end) / count), abs_tol=1e-6)


def test_seen_and_held_out_scenes_share_no_combination_and_no_caption_is_left_out():
    looks, captions = {}, {}
    for part in learn_shapes.PARTS:
        scenes = learn_shapes.choose_scenes(part, seed=3)
        assert len(scenes) == learn_shapes.COUNT
        looks[part] = {(scene.objects[0].colour, scene.objects[0].shape) for scene in scenes}
        captions[part] = [caption(scene) for scene in scenes]
        assert len({captions[part].count(text) for text in set(captions[part])}) == 1
    assert looks == {"seen": set(SEEN), "held-out": set(HELD_OUT)}
    assert {part: len(set(texts)) for part, texts in captions.items()} == {"seen": 18 * 18, "held-out": 6 * 18}


@pytest.mark.parametrize("part", learn_shapes.PARTS)
def test_accuracy_counts_what_is_right(seed, part):
    """Right pictures with some replaced by others, against a count of the attributes that two scenes share."""
    scenes = learn_shapes.choose_scenes(part, seed)[:30]
    shown = [scene if i % 3 else random.Random(seed + i).choice(scenes) for i, scene in enumerate(scenes)]
    pictures = learn_shapes.draw_scenes(shown, 32, seed)
    assert not torch.equal(pictures[1], draw(shown[1], 32))  # real pictures are at random offsets, as in training
    assert [parse(picture) for picture in pictures] == shown

    found = learn_shapes.accuracy(scenes, pictures)
    pairs = [(a.objects[0], b.objects[0]) for a, b in zip(scenes, shown, strict=True)]
    for name in ("colour", "shape", "position", "size"):
        assert found[name]["right"] == sum(getattr(a, name) == getattr(b, name) for a, b in pairs)
    assert found["joint"]["right"] == sum(a == b for a, b in pairs) < len(scenes)
    assert all(entry["of"] == 30 and entry["accuracy"] == entry["right"] / 30 for entry in found.values())


@pytest.mark.slow
def test_the_whole_on_a_toy_model(tmp_path, monkeypatch):
    monkeypatch.setitem(DVAE_PRESETS, "tiny", DiscreteVAEConfig(32, 32, (8, 8, 16), blocks=1, codebook_dim=8))
    prior = PriorConfig(24, 300, (8, 8), 32, layers=2, heads=4, head_dim=16, conv_kernel=3)
    monkeypatch.setitem(PRIOR_PRESETS, "tiny", prior)
    monkeypatch.setattr(learn_shapes, "DATA", "shapes-simple:400")
    assert learn_shapes.main(minutes=0.05, out=tmp_path, seed=5, threads=1) == 0

    report = json.loads((tmp_path / "learn_shapes.json").read_text())
    for part in learn_shapes.PARTS:
        assert all(found["accuracy"] == 1 for found in report["accuracy"][part]["real"].values())
        drawn = report["accuracy"][part]["drawn"]
        assert drawn["joint"]["right"] <= min(found["right"] for found in drawn.values())
        assert 1 <= report["models"][part]["codes in use"] <= 32
    page = (tmp_path / "learn_shapes.md").read_text()
    assert page.count("100.0 (98.8–100.0)") >= 2 * len(learn_shapes.ATTRIBUTES) and "minutes" in page
    grid = Image.open(tmp_path / "learn_shapes.png")
    assert grid.width > 64 * learn_shapes.SHOWN and grid.height > 64 * 6

    again = learn_shapes.train(0.05, tmp_path, 5, 1)  # nothing is left to train
    assert again["training"]["steps"] == report["training"]["steps"]


def test_minutes_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="minutes must be positive"):
        learn_shapes.main(minutes=0, out=tmp_path)
