"""Synthetic shapes: the grammar, the rendering, the captions, and the parser."""

import itertools
import random
from collections import Counter

import pytest
import torch
from PIL import Image, ImageFilter

from dalle.data import open_source, shapes, split
from dalle.data.shapes import Object, Scene, caption, render
from dalle.data.shapes_parser import compare, parse
from dalle.errors import UserError
from dalle.images import to_tensor

KINDS = {"single": 432, "count": 576, "relation": 39_744}


RECONSTRUCTIONS = [(32, 1.0, 8, 1.0), (64, 2.0, 8, 1.0), (32, 0.7, 20, 0.8), (64, 1.5, 10, 0.65)]


def random_offset(rng):
    """Mostly the extremes, where images are hardest to read."""
    return tuple(rng.choice((-1, 0, 1, rng.uniform(-1, 1))) * shapes.MAX_OFFSET for _ in "yx")


@pytest.mark.parametrize("kind", KINDS)
def test_every_scene_is_of_its_kind_and_none_comes_twice(kind):
    scenes = shapes.all_scenes(kind)
    assert len(set(scenes)) == len(scenes) == KINDS[kind]
    assert all(scene.kind == kind and list(scene.objects) == sorted(scene.objects) for scene in scenes)


def test_captions():
    a, b = Object(0, 0, "red", "circle", "small"), Object(0, 2, "green", "triangle", "large")
    below = Object(2, 0, "blue", "cross", "small")
    squares = tuple(Object(1, i, "blue", "square", "small") for i in range(3))
    assert caption(Scene((a,))) == "a small red circle at the top left"
    assert caption(Scene((squares[1],))) == "a small blue square at the center"
    assert caption(Scene(squares)) == "three blue squares"
    assert caption(Scene((below, Object(2, 1, "blue", "cross", "small")))) == "two blue crosses"
    assert caption(Scene((a, b))) == "a red circle left of a green triangle"
    assert caption(Scene((a, below))) == "a red circle above a blue cross"
    for nothing in [(), (a, Object(1, 2, "green", "triangle", "large")), (a, b, below), (a, squares[0], squares[1])]:
        with pytest.raises(ValueError, match="not a scene"):
            caption(Scene(nothing))


def test_captions_tell_apart_what_they_should():
    assert len({caption(s) for s in shapes.all_scenes("single")}) == 432
    assert len({caption(s) for s in shapes.all_scenes("count")}) == 6 * 4 * 2
    assert len({caption(s) for s in shapes.all_scenes("relation")}) == 24 * 23 * 2


@pytest.mark.parametrize("size", [32, 64])
def test_parser_is_exact_on_rendered_images(size, seed):
    rng = random.Random(seed)
    scenes = shapes.all_scenes("single") + shapes.all_scenes("count")
    for scene in scenes + rng.sample(shapes.all_scenes("relation"), 300):
        offset = random_offset(rng)
        assert parse(render(scene, size, offset)) == scene, offset


@pytest.mark.slow
@pytest.mark.full
def test_parser_reads_every_scene_of_the_grammar(seed):
    rng, size = random.Random(seed), 32  # the hardest size
    for scene in itertools.chain.from_iterable(map(shapes.all_scenes, KINDS)):
        offset = random_offset(rng)
        assert parse(render(scene, size, offset)) == scene, offset


def test_parser_is_exact_at_other_sizes(seed):
    rng = random.Random(seed)
    for _ in range(200):
        scene, size, offset = shapes.random_scene(rng, "train"), rng.randrange(32, 97), random_offset(rng)
        assert parse(render(scene, size, offset)) == scene, (size, offset)


@pytest.mark.parametrize(("size", "blur", "noise", "fade"), RECONSTRUCTIONS)
def test_parser_survives_the_blur_of_a_reconstruction(size, blur, noise, fade, seed):
    rng, right, total = random.Random(seed), Counter(), Counter()
    for _ in range(300):
        scene = shapes.random_scene(rng, rng.choice(("train", "heldout")))
        sharp = Image.fromarray(render(scene, size, random_offset(rng)).permute(1, 2, 0).numpy())
        image = to_tensor(sharp.filter(ImageFilter.GaussianBlur(blur))).float()
        image = 255 - fade * (255 - image) + noise * torch.randn(3, size, size)
        for attribute, correct in compare(scene, parse(image.clamp(0, 255).byte())).items():
            right[attribute] += correct
            total[attribute] += 1
    accuracy = {attribute: right[attribute] / total[attribute] for attribute in total}
    assert set(accuracy) == {"colour", "shape", "size", "position", "count", "relation"}
    assert min(accuracy.values()) > 0.95, accuracy


def test_parser_finds_nothing_in_a_blank_image_and_rejects_other_tensors(seed):
    assert parse(torch.full((3, 32, 32), 255, dtype=torch.uint8)) == Scene(())
    assert parse((255 - 20 * torch.rand(3, 64, 64)).byte()) == Scene(())
    assert parse(torch.randint(256, (3, 32, 32), dtype=torch.uint8)).kind is None
    for shape, dtype in [((3, 32, 32), torch.float32), ((3, 32, 31), torch.uint8), ((32, 32), torch.uint8)]:
        with pytest.raises(ValueError, match="uint8"):
            parse(torch.zeros(shape, dtype=dtype))


def test_objects_stay_in_their_cell_and_inside_the_image(seed):
    rng = random.Random(seed)
    for _ in range(300):
        size, offset = rng.randrange(32, 129), random_offset(rng)
        row, column, shape = rng.randrange(3), rng.randrange(3), rng.choice(shapes.SHAPES)
        whole = slice(0, size), slice(0, size)
        centre = (row + 0.5) / 3 + offset[0], (column + 0.5) / 3 + offset[1]
        alpha = shapes.coverage(shape, shapes.SIZES["large"], centre, whole, size)
        alpha[shapes.cell(row, column, size)] = 0
        assert alpha.max() == 0, (size, offset, shape)


def test_coverage_has_the_area_of_the_shape():
    whole = slice(0, 256), slice(0, 256)
    areas = {"circle": 3.14159265 / 4, "square": 1, "triangle": 1 / 2, "cross": 5 / 9}
    for (shape, area), side in itertools.product(areas.items(), shapes.SIZES.values()):
        measured = shapes.coverage(shape, side, (0.5, 0.5), whole, 256).mean()
        assert measured == pytest.approx(area * side**2, rel=0.01)


def test_compare_names_what_is_wrong():
    red, blue = Object(0, 0, "red", "circle", "small"), Object(0, 2, "blue", "cross", "large")
    single = Scene((red,))
    assert compare(single, single) == dict.fromkeys(("colour", "shape", "size", "position"), True)
    assert compare(single, Scene((Object(0, 1, "green", "square", "large"),))) == dict.fromkeys(
        ("colour", "shape", "size", "position"), False
    )
    assert compare(single, Scene(())) == dict.fromkeys(("colour", "shape", "size", "position"), False)
    assert compare(single, Scene((red, Object(1, 1, "red", "circle", "small"))))["position"] is False
    two, three = (Scene(tuple(Object(1, c, "red", "square", "small") for c in range(n))) for n in (2, 3))
    assert compare(two, three) == {"colour": True, "shape": True, "count": False}
    relation = Scene((red, blue))
    assert compare(relation, relation) == {"colour": True, "shape": True, "relation": True}
    swapped = Scene((Object(0, 0, "blue", "circle", "small"), Object(0, 2, "red", "cross", "large")))
    assert compare(relation, swapped) == {"colour": True, "shape": True, "relation": False}
    above = Scene((red, Object(2, 0, "blue", "cross", "large")))
    assert compare(relation, above) == {"colour": True, "shape": True, "relation": False}


def test_held_out_combinations_leave_every_colour_and_shape_seen():
    assert set(shapes.HELD_OUT).isdisjoint(shapes.SEEN) and len(shapes.HELD_OUT) + len(shapes.SEEN) == 24
    for part in (shapes.HELD_OUT, shapes.SEEN):
        assert {colour for colour, _ in part} == set(shapes.COLOURS)
        assert {shape for _, shape in part} == set(shapes.SHAPES)


@pytest.mark.parametrize("spec", ["shapes:2000", "shapes-simple:2000"])
def test_source_is_split_by_combination(spec):
    source = open_source(spec, 32)
    train, held_out = split(source, "train"), split(source, "heldout")
    assert (len(source), len(train), len(held_out)) == (2000, 1900, 100)
    for part, combinations in ((train, shapes.SEEN), (held_out, shapes.HELD_OUT)):
        seen = Counter()
        for i in range(len(part)):
            scene = part.scene(i)
            assert part.caption(i) == caption(scene)
            pairs = {(item.colour, item.shape) for item in scene.objects}
            assert pairs <= set(shapes.SEEN) if part is train else pairs & set(shapes.HELD_OUT)
            seen.update(pairs)
        assert set(combinations) <= set(seen)
    kinds = Counter(source.scene(i).kind for i in range(len(source)))
    assert set(kinds) == ({"single"} if "simple" in spec else {"single", "count", "relation"})
    assert min(kinds.values()) > 0.28 * 2000


def test_a_sample_is_a_function_of_its_index():
    source, longer = open_source("shapes:50", 32), open_source("shapes:1000", 32)
    for i in (0, 7, 19, 49):
        sample, again = source[i], longer[i]
        assert torch.equal(sample.image, again.image) and sample[1:] == again[1:] == ((source.caption(i),), str(i))
        assert sample.image.dtype == torch.uint8 and sample.image.shape == (3, 32, 32)
        assert parse(sample.image) == source.scene(i)
    assert source[-1].key == "49"
    assert len({source[i].image.numpy().tobytes() for i in range(50)}) == 50
    with pytest.raises(IndexError):
        source[50]
    assert len(open_source("shapes", 32)) == shapes.DEFAULT_COUNT


@pytest.mark.parametrize("spec", ["shapes:", "shapes:0", "shapes:-3", "shapes:many", "shapes-simple:1.5", "shapes:²"])
def test_an_invalid_count_is_rejected(spec):
    with pytest.raises(UserError, match="positive integer") as caught:
        open_source(spec, 32)
    assert spec in str(caught.value)
