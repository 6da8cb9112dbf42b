"""Evaluation: every measure against an independent computation, and the whole command on tiny models."""

import itertools
import json
import math
import random
import re
import sys

import numpy as np
import pytest
import torch

from dalle import DiscreteVAE, DiscreteVAEConfig, Pipeline, Prior, PriorConfig, images
from dalle.cli import main
from dalle.data import open_source, split
from dalle.data.shapes import Object, Scene, ShapesSource, caption, render
from dalle.data.source import Sample, Source
from dalle.evaluation import evaluate as whole
from dalle.evaluation import evaluation_set, measures, ranking, shapes
from dalle.evaluation.evaluate import EvaluateConfig, evaluate
from dalle.evaluation.statistics import proportion, ssim, wilson
from dalle.evaluation.table import table
from dalle.models.clip import CLIP, CLIPConfig
from dalle.models.prior import IGNORE
from dalle.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def pipeline():
    """A tiny model with random weights."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(ShapesSource(32, 60).captions(), 300)
    dvae = DiscreteVAE(DiscreteVAEConfig(32, 32, (8, 8, 16), blocks=1, codebook_dim=8, codebook_std=1.0))
    prior = Prior(PriorConfig(12, tokenizer.vocab_size, (8, 8), 32, layers=2, heads=2, head_dim=16, conv_kernel=3))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    clip = CLIP(CLIPConfig(32, 12, tokenizer.vocab_size, (8, 16), text_width=16, text_layers=1, text_heads=2))
    return Pipeline(dvae, prior, tokenizer, clip)


@pytest.fixture
def model(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Listed(Source):
    """Images and captions from a list."""

    def __init__(self, images, captions):
        self.images, self.texts, self.skipped = images, captions, []

    def __len__(self):
        return len(self.texts)

    def key(self, index):
        return str(range(len(self))[index])

    def captions_of(self, index):
        return self.texts[index]

    def load(self, index):
        return Sample(self.images[index], self.texts[index], self.key(index))


# statistics


def slow_ssim(x, y):
    """The formulas of Wang et al. (2004), window by window, of one image [3, H, W]."""
    steps = np.arange(11) - 5
    weights = np.exp(-(steps[:, None] ** 2 + steps[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for c, i, j in itertools.product(range(3), range(x.shape[1] - 10), range(x.shape[2] - 10)):
        a, b = x[c, i : i + 11, j : j + 11], y[c, i : i + 11, j : j + 11]
        ma, mb = (weights * a).sum(), (weights * b).sum()
        va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
        cov = (weights * (a - ma) * (b - mb)).sum()
        c1, c2 = 0.01**2, 0.03**2
        found.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(found)


def test_ssim_equals_a_double_loop(seed):
    x = torch.rand(3, 3, 14, 17)
    y = (x + 0.3 * torch.randn(x.shape)).clamp(0, 1)
    expected = [slow_ssim(a.double().numpy(), b.double().numpy()) for a, b in zip(x, y)]
    np.testing.assert_allclose(ssim(x, y).numpy(), expected, rtol=0, atol=1e-9)
    assert torch.allclose(ssim(x, x), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 7, 324])
def test_the_ends_of_the_interval_are_where_the_score_test_turns(count):
    for right in {0, 1, count // 2, count}:
        low, high = wilson(right, count)
        part = right / count
        assert 0 <= low <= part <= high <= 1
        for end in (low, high):
            # |part - p| = z sqrt(p (1 - p) / n) defines the interval; 0 and 1 solve it where all are wrong or right.
            assert math.isclose(abs(part - end), 1.959964 * math.sqrt(end * (1 - end) / count), abs_tol=1e-6)


# ranks of images


def test_ranks_are_those_of_sorted_box_averages(seed):
    gallery = torch.randint(256, (12, 3, 48, 48), dtype=torch.uint8)
    shown = torch.randint(256, (5, 3, 48, 48), dtype=torch.uint8)
    wanted = [[3], [0, 7], [11], [5], [2, 4, 9]]
    table = ranking.distances(ranking.thumbnails(shown), ranking.thumbnails(gallery))

    def boxes(x):
        return x.double().numpy().reshape(len(x), 3, 16, 3, 16, 3).mean((3, 5)).reshape(len(x), -1)

    slow = ((boxes(shown)[:, None] - boxes(gallery)[None]) ** 2).sum(2)
    np.testing.assert_allclose(table.numpy() / ranking.UNIT**2, slow, rtol=1e-4)
    expected = [1 + min(list(np.argsort(row)).index(i) for i in columns) for row, columns in zip(slow, wanted)]
    assert ranking.ranks(table, wanted).tolist() == expected


@pytest.mark.parametrize("size", [32, 50])  # boxes of whole pixels, and others
def test_equal_images_tie(seed, size):
    gallery = torch.randint(256, (6, 3, size, size), dtype=torch.uint8)
    gallery[4] = gallery[1]
    small = ranking.thumbnails(gallery)
    found = ranking.ranks(ranking.distances(small, small), [[0], [4], [2], [3], [1], [5]])
    assert found.tolist() == [1] * 6


def test_a_summary_counts():
    found = ranking.summary(torch.tensor([1, 1, 4, 6, 30, 11]))
    assert [found[f"top-{top}"]["correct"] for top in (1, 5, 10)] == [2, 3, 4]
    assert found["median rank"] == 5 and found["top-5"]["proportion"] == 0.5 and found["top-1"]["total"] == 6


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("man cook dark skin tone", "man cook medium-dark skin tone"),  # five words of six, and none is missing
        ("a red heart", "Red heart suit"),  # two words in common; "red" alone has one
        ("green lamp", "green book"),  # the first of equals
        ("red", "red apple"),  # itself excluded; the fewest other words
        ("heart heart red", "Red heart suit"),  # sets: a word twice counts once
    ],
)
def test_the_nearest_caption(asked, expected):
    known = ["red", "Red heart suit", "red apple", "man cook light skin tone", "man cook medium-dark skin tone",
             "green book", "green door"]  # fmt: skip
    assert known[ranking.nearest_caption(asked, [(c, ranking.words(c)) for c in known])] == expected


def test_a_gallery_ranks_images_and_the_nearest_caption(seed):
    """Uniform grey images: distance is that of their levels."""
    levels, texts = [10, 20, 40, 80, 160], [("red cat",), ("red dog", "a hound"), ("cat",), ("big dog",), ("ox",)]
    flat = [torch.full((3, 32, 32), level, dtype=torch.uint8) for level in levels]
    held_out = Listed([torch.full((3, 32, 32), 35, dtype=torch.uint8)], [("red big dog",)])
    gallery = ranking.Gallery(Listed(flat, texts), held_out, evaluation_set.no_progress)
    shown = torch.stack([torch.full((3, 32, 32), level, dtype=torch.uint8) for level in (21, 34, 100)])
    # From 21: 20, 10, 35 (14 away), 40, … From 34: 35, 40, 20 (14 away), … From 100: 80 (20), 160 (60 away), ties 40.
    assert gallery.rank(["a hound", "red dog", "cat"], shown)["ranks"] == [1, 3, 2]
    # "red big dog" has two words in common with "red dog" and with "big dog"; the first is shown, level 20, and among
    # 20, 10, 35 (15 away) the image of the caption is third.
    assert gallery.rank_of_nearest_caption(["red big dog"])["ranks"] == [3]


@pytest.mark.slow
@pytest.mark.optional
def test_the_nearest_caption_nearly_never_finds_a_held_out_emoji_but_its_neighbourhood():
    try:
        source = open_source("emoji", 32)
    except ValueError as error:
        pytest.skip(str(error))
    held_out = split(source, "heldout")
    gallery = ranking.Gallery(split(source, "train"), held_out, evaluation_set.no_progress)
    found = gallery.rank_of_nearest_caption(list(held_out.captions()))
    assert found["top-1"]["proportion"] < 0.02 and 0.6 < found["top-5"]["proportion"] < 0.95


# measures of the models


def test_evenly_spaced_numbers():
    found = [evaluation_set.evenly_spaced(count, cap) for count, cap in ((10, 4), (3, 5), (0, 5))]
    assert found == [[0, 2, 5, 7], [0, 1, 2], []]


@pytest.mark.parametrize("candidates", [1, 3, 200])
def test_candidates_are_those_of_generate(pipeline, candidates):
    captions = ["a small red circle", "two blue squares", "a green cross"][: 1 if candidates == 200 else 3]
    rows = list(evaluation_set.generate(pipeline, captions, candidates, 40, evaluation_set.no_progress, ""))
    for i, (text, found) in enumerate(zip(captions, rows, strict=True)):
        [row] = pipeline.generate(text, candidates=candidates, seed=40 + i * candidates)
        assert [result.seed for result in found] == list(range(40 + i * candidates, 40 + (i + 1) * candidates))
        expected = {result.seed: result.image.tobytes() for result in row}
        assert {result.seed: result.image.tobytes() for result in found} == expected


def test_the_first_and_the_best_candidate_are_those_of_generate(pipeline):
    captions = ["a small red circle", "two blue squares"]
    found = evaluation_set.first_and_best(pipeline, captions, 5, 3, evaluation_set.no_progress, "")
    for i, text in enumerate(captions):
        [row] = pipeline.generate(text, candidates=5, seed=3 + 5 * i)
        first = next(result for result in row if result.seed == 3 + 5 * i)
        assert torch.equal(found["first candidate"][i], images.to_tensor(first.image))
        assert torch.equal(found["best of 5 by CLIP"][i], images.to_tensor(row[0].image))


def test_nats_per_token_are_means_over_all_tokens(pipeline):
    part = split(ShapesSource(32, 100), "train")
    indices = evaluation_set.evenly_spaced(len(part), 70)
    group = evaluation_set.build_evaluation_set(pipeline.dvae, part, indices, evaluation_set.no_progress, "")
    found = measures.likelihood(pipeline, group)
    text = pipeline.prior.pack_text([pipeline.tokenizer.encode(c) for c in group.captions], truncate=True)
    with torch.no_grad():
        text_logits, image_logits = pipeline.prior(text, group.codes.flatten(1))
    targets = pipeline.prior.text_targets(text)
    text_nats = -text_logits.double().log_softmax(2).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    image_nats = -image_logits.double().log_softmax(2).gather(2, group.codes.flatten(1)[..., None])
    assert found["text tokens"] == (targets != IGNORE).sum() and found["image tokens"] == 70 * 64
    assert math.isclose(found["nats per text token"], text_nats[targets != IGNORE].mean(), rel_tol=1e-5)
    assert math.isclose(found["nats per image token"], image_nats.mean(), rel_tol=1e-5)


def test_retrieval_counts_equal_captions_as_right(pipeline, monkeypatch):
    captions = ["a cat", "a dog", "a cat", "an ox"]
    scores = torch.tensor([[.1, .9, .2, .0], [.8, .7, .6, .5], [.3, .2, .1, .4], [.0, .1, .2, .3]])  # fmt: skip
    monkeypatch.setattr(pipeline.clip, "similarities", lambda images, text: scores)
    nothing = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    group = evaluation_set.EvaluationSet([0, 1, 2, 3], captions, nothing, torch.zeros(4, 8, 8), nothing)
    found = measures.retrieval(pipeline, {"training": group})["training"]
    # Ranks by rows: cat (0.2 behind 0.9) 2, dog (0.7 behind 0.8) 2, cat (0.3 behind 0.4) 2, ox 1.
    assert found["images, image to text"]["top-1"]["correct"] == 1
    # By columns: cat (0.3 behind 0.8), dog (0.7 behind 0.9), cat (0.2 behind 0.6), ox (0.3 behind 0.5, 0.4).
    assert found["images, text to image"]["top-1"]["correct"] == 0
    assert all(entry["top-5"] == proportion(4, 4) for entry in found.values())

    monkeypatch.setattr(pipeline.clip, "similarities", lambda *_: torch.zeros(4, 4))
    found = measures.retrieval(pipeline, {"training": group})["training"]
    assert all(entry["top-1"]["correct"] == 0 for entry in found.values())  # equal scores do not discriminate


# shapes


def test_an_extra_object_in_the_image_is_not_joint():
    wanted = Scene((Object(0, 0, "red", "circle", "large"),))
    more = Scene((*wanted.objects, Object(2, 1, "red", "circle", "large")))
    parser = shapes.CachingParser()
    found = parser.attributes(wanted, render(more, 32))
    assert found == {"colour": True, "shape": True, "size": True, "position": False, "joint": False}
    assert parser.attributes(wanted, render(wanted, 32))["joint"]


def test_accuracy_counts_what_is_right(seed):
    """Correct images with some replaced by others, against a count of the attributes that two scenes share."""
    source = ShapesSource(32, 40, simple=True)
    scenes = [source.scene(i) for i in range(40)]
    shown = [scene if i % 3 else random.Random(seed + i).choice(scenes) for i, scene in enumerate(scenes)]
    found = shapes.accuracy(shapes.CachingParser(), scenes, torch.stack([render(scene, 32) for scene in shown]))
    pairs = [(a.objects[0], b.objects[0]) for a, b in zip(scenes, shown, strict=True)]
    for name in ("colour", "shape", "position", "size"):
        assert found[name]["correct"] == sum(getattr(a, name) == getattr(b, name) for a, b in pairs)
    assert found["joint"]["correct"] == sum(a == b for a, b in pairs) < len(scenes)
    assert all(entry["total"] == 40 and entry["proportion"] == entry["correct"] / 40 for entry in found.values())
    assert "relation" not in found and "count" not in found


def test_equal_images_are_parsed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(shapes, "parse", lambda image: calls.append(1) or Scene(()))
    parser = shapes.CachingParser()
    for level in (0, 1, 0, 0):
        parser.parse(torch.full((3, 32, 32), level, dtype=torch.uint8))
    assert len(calls) == 2


def test_accuracy_against_candidates_is_the_mean_over_disjoint_groups(seed):
    right, scores = torch.rand(5, 13) < 0.4, torch.rand(5, 13)
    found = shapes.against_candidates(right, scores)
    assert found["candidates"] == [1, 2, 4, 8]
    for at, size in enumerate(found["candidates"]):
        best, either = [], []
        for row, by in zip(right.tolist(), scores.tolist()):
            for first in range(0, 13 - size + 1, size):
                group = range(first, first + size)
                best.append(row[max(group, key=lambda i: by[i])])
                either.append(any(row[i] for i in group))
        assert math.isclose(found["ranked"][at], np.mean(best)) and math.isclose(found["oracle"][at], np.mean(either))
        assert found["oracle, 95 %"][at] == pytest.approx(wilson(5 * np.mean(either), 5))


# the command


def write_folder(directory, count=30):
    directory.mkdir()
    source = ShapesSource(48, count)
    for i in range(count):
        images.to_pil(source[i].image).save(directory / f"{i}.png")
        (directory / f"{i}.txt").write_text(caption(source.scene(i)))
    return directory


def run(*options):
    return main(["evaluate", *map(str, options)])


def test_shapes(model, tmp_path, capsys):
    out = tmp_path / "out"
    common = "--captions", 6, "--candidates", 3, "--ranked", 9, "--ranked-captions", 2
    assert run("--model", model, "--data", "shapes:200", "--out", out, *common) == 0
    said = capsys.readouterr()
    report = json.loads((out / "evaluation.json").read_text())
    assert report["dvae"]["training"]["images"] == report["prior"]["held-out"]["captions"] == 6
    for found in report["shapes"].values():
        assert all(entry["proportion"] == 1 for entry in found["real images"].values())
        assert set(found) == {"real images", "reconstructions", "first candidate", "best of 3 by CLIP"}
    assert report["candidates"]["held-out"]["joint"]["candidates"] == [1, 2, 4, 8]
    assert report["candidates"]["held-out"]["joint"]["captions"] == 2
    assert set(report["conditions"]["fingerprints"]) == {"dvae", "prior", "clip"}
    assert set(report["seconds"]) == {"dvae", "prior", "retrieval", "shapes", "candidates"}
    assert "held-out" in said.out and max(map(len, said.out.splitlines()[:-1])) <= 120 and "generation" in said.err


def test_a_folder_with_a_model_without_a_clip(pipeline, tmp_path, capsys):
    Pipeline(pipeline.dvae, pipeline.prior, pipeline.tokenizer).save_pretrained(tmp_path / "model")
    folder, out = write_folder(tmp_path / "images"), tmp_path / "out"
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "broken.txt").write_text("broken")
    assert run("--model", tmp_path / "model", "--data", folder, "--out", out, "--captions", 50) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert "retrieval" not in report and "no CLIP" in capsys.readouterr().out
    assert report["ranks"]["images"] == 30 and "skin" not in json.dumps(report)
    for part in {"training", "held-out"} & set(report["ranks"]):
        assert set(report["ranks"][part]) == {"first candidate", "nearest training caption", "reconstruction"}
    assert sum(report["conditions"]["images in the source"].values()) >= 30


def test_a_folder_of_one_caption_has_no_nearest_caption(pipeline, tmp_path):
    Pipeline(pipeline.dvae, pipeline.prior, pipeline.tokenizer).save_pretrained(tmp_path / "model")
    folder, out = write_folder(tmp_path / "images", 6), tmp_path / "out"
    for text in folder.glob("*.txt"):
        text.write_text("a red circle")
    assert run("--model", tmp_path / "model", "--data", folder, "--out", out) == 0
    found = json.loads((out / "evaluation.json").read_text())["ranks"]["training"]
    assert set(found) == {"first candidate", "reconstruction"} and found["reconstruction"]["top-1"]["total"] >= 1


def test_emoji_without_skin_tones_are_a_split_of_their_own():
    captions = [("cat",), ("cook dark skin tone",), ("dog",)]
    source = Listed([torch.zeros(3, 4, 4)] * 3, captions)
    source.split = lambda part: source
    assert list(whole.choose_parts(source, "emoji")[whole.PLAIN].captions()) == ["cat", "dog"]
    assert whole.PLAIN not in whole.choose_parts(source, "images")


def test_what_was_measured_before_an_interruption_is_kept(model, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole, "retrieval", interrupt)
    assert run("--model", model, "--data", "shapes:100", "--out", tmp_path / "out", "--captions", 3) == 130
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert {"dvae", "prior"} <= set(report) and "shapes" not in report
    assert "evaluation.json" in capsys.readouterr().err


def test_plots(model, tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "images", 12)
    small = "--model", model, "--captions", 3, "--candidates", 2, "--ranked", 2
    pytest.importorskip("matplotlib")
    assert run(*small, "--data", folder, "--out", tmp_path / "a") == 0
    assert run(*small, "--data", "shapes:100", "--out", tmp_path / "b") == 0
    assert (tmp_path / "a/ranks.png").exists() and (tmp_path / "b/candidates.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(*small, "--data", folder, "--out", tmp_path / "c") == 0
    assert "no plots" in capsys.readouterr().err and not list((tmp_path / "c").glob("*.png"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--captions", 0], "captions must be at least 1, not 0"),
        (["--candidates", -1], "candidates must be at least 1"),
        (["--ranked", 0], "ranked must be at least 1"),
        (["--ranked-captions", 0], "ranked.captions must be at least 1"),
        (["--threads", 0], "threads must be at least 1"),
        (["--seed", -1], "seed must be in"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "shapes:x"], "positive integer"),
        (["--data", "emoji", "--font", "nowhere.ttf"], "nowhere.ttf"),
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--device", "warp"], "device must be one that this PyTorch can use; got 'warp'"),
        (["--out", "/proc/x"], "/proc/x"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    assert run("--model", model, "--data", "shapes:40", *options) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1 and error.startswith("dalle: ")


def test_the_table_shows_every_section(model, tmp_path):
    config = EvaluateConfig(model=str(model), data="shapes:100", out=tmp_path, captions=3, candidates=2, ranked=2)
    page = table(evaluate(config))
    headings = "PSNR, dB", "nats per token", "CLIP retrieval among 3", "attributes of shapes", "best of N candidates"
    for heading in headings:
        assert heading in page
