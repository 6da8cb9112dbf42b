"""CLIP: embeddings and loss against independent arithmetic, training, and invalid input."""

import dataclasses
import math
import os
import re
import signal
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from dalle import CLIP, CLIPConfig, DiscreteVAE, DiscreteVAEConfig, UserError
from dalle.cli import main
from dalle.data import open_source, split
from dalle.files import read_tensors
from dalle.images import to_uint8
from dalle.models.checkpoint import load_clip, load_dvae, save_part
from dalle.models.clip import PRESETS
from dalle.tokenizer import Tokenizer
from dalle.training import train_clip as module
from dalle.training.loader import ImageLoader
from dalle.training.train_clip import CLIPTask, TrainCLIPConfig, WithReconstructions, recall, shift, train_clip
from statistics_for_tests import REJECT, binomial_p

DATA = "shapes-simple:80"
TEST = CLIPConfig(16, 8, 300, (8, 16), text_width=16, text_layers=2, text_heads=2, embedding_dim=12)


@pytest.fixture
def clip(seed):
    return CLIP(TEST).eval()


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A model directory with an untrained dVAE and a tokenizer."""
    monkeypatch.setitem(PRESETS, "test", TEST)
    torch.manual_seed(0)
    save_part(tmp_path, "dvae", DiscreteVAE(DiscreteVAEConfig(16, 32, (8, 16, 16), blocks=1, codebook_dim=8)))
    Tokenizer.train(open_source(DATA, 16).captions(), 300).save(tmp_path / "tokenizer.json")
    return tmp_path


def train_config(out, **change):
    defaults = dict(data=DATA, preset="test", steps=6, batch_size=8, log_every=1, eval_every=4, threads=1)
    return TrainCLIPConfig(out=out, **defaults | change)


def random_captions(count, most=7):
    return [torch.randint(300, (length,)).tolist() for length in torch.randint(1, most + 1, (count,))]


# The model


def test_the_preset_for_emoji_fits_into_the_package():
    model = CLIP(CLIPConfig.preset("small"))
    assert 2 * sum(p.numel() for p in model.parameters()) < 2.5e6  # bytes in float16


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_embeddings_have_length_one(name, seed):
    model = CLIP(config := CLIPConfig.preset(name))
    images = torch.rand(3, 3, config.image_size, config.image_size)
    for points in (model.encode_images(images), model.encode_text(model.pack_text([[1], [2, 3], [5]]))):
        assert points.shape == (3, config.embedding_dim) and points.dtype == torch.float32
        torch.testing.assert_close(points.square().sum(1), torch.ones(3))


def test_bytes_and_fractions_are_the_same_image(clip):
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(clip.encode_images(images), clip.encode_images(images / 255))


def test_packed_text(clip):
    text = clip.pack_text([[5, 6], list(range(10, 17))])
    assert text.tolist() == [[5, 6, 300, 300, 300, 300, 300, 300], [10, 11, 12, 13, 14, 15, 16, 300]]
    assert clip.pack_text([list(range(20))], truncate=True).tolist() == [[0, 1, 2, 3, 4, 5, 6, 300]]


def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(clip):
    captions = random_captions(6)
    together = clip.encode_text(clip.pack_text(captions))
    alone = torch.cat([clip.encode_text(clip.pack_text([caption])) for caption in captions])
    torch.testing.assert_close(together, alone)


def test_every_token_of_a_caption_counts(clip):
    caption = torch.randint(299, (7,)).tolist()
    others = [[token + (i == place) for i, token in enumerate(caption)] for place in range(7)]
    points = clip.encode_text(clip.pack_text([caption, *others]))
    assert (points[1:] - points[0]).abs().amax(1).min() > 1e-4


def test_the_text_encoder_against_its_own_arithmetic(clip):
    """Causal attention written out, in float64 and without the sparse kernel, over all positions."""
    clip.double()
    captions = random_captions(5)
    encoder, text = clip.text, clip.pack_text(captions)
    x = encoder.embedding(text) + encoder.position.weight
    hidden = torch.ones(8, 8).triu(1).bool()
    for layer in encoder.layers:
        q, k, v = layer.attention.qkv(layer.attention_norm(x)).unflatten(-1, (3, 2, 8)).unbind(2)
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
        weights = weights.masked_fill(hidden, -math.inf).softmax(-1)
        x = x + layer.attention.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))
        inner = layer.mlp_in(layer.mlp_norm(x))
        x = x + layer.mlp_out(inner * torch.sigmoid(1.702 * inner))
    last = torch.stack([row[len(caption)] for row, caption in zip(x, captions, strict=True)])
    points = encoder.output(encoder.norm(last))
    expected = points / points.norm(dim=1, keepdim=True)
    torch.testing.assert_close(clip.encode_text(text).double(), expected, atol=1e-6, rtol=0)


def hand_counted_loss(cosines, scale, same):
    """The loss in plain Python: pairs (i, j) in `same` are no negatives, except that (i, i) is the positive."""
    n, total = len(cosines), 0.0
    for i in range(n):
        rivals = [j for j in range(n) if i == j or not same[i][j]]
        for row in (cosines[i], [cosines[j][i] for j in range(n)]):
            total += math.log(sum(math.exp(scale * row[j]) for j in rivals)) - scale * row[i]
    return total / (2 * n)


def test_the_loss_by_hand(clip):
    captions = random_captions(7)
    captions[4] = captions[1]
    keys = torch.tensor([0, 1, 2, 3, 4, 2, 6])
    images, text = torch.rand(7, 3, 16, 16), clip.pack_text(captions)
    cosines = (clip.encode_images(images).double() @ clip.encode_text(text).double().t()).tolist()
    for given in (keys, None):
        same = [[captions[i] == captions[j] or (given is not None and keys[i] == keys[j]) for j in range(7)]
                for i in range(7)]  # fmt: skip
        losses = clip.loss(images, text, given)
        assert losses["loss"].item() == pytest.approx(hand_counted_loss(cosines, 1 / 0.07, same), rel=1e-4)
        assert losses["scale"].item() == pytest.approx(1 / 0.07)


def test_a_batch_of_one_caption_has_no_loss(clip):
    losses = clip.loss(torch.rand(4, 3, 16, 16), clip.pack_text([[1, 2]] * 4))
    assert losses["loss"].item() == 0 and losses["accuracy"].item() == 1
    losses["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in clip.parameters())


def test_the_scale_never_passes_100(clip):
    with torch.no_grad():
        clip.log_scale.fill_(9.0)
    assert clip.loss(torch.rand(2, 3, 16, 16), clip.pack_text([[1], [2]]))["scale"].item() == pytest.approx(100)
    assert clip.log_scale.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(image_size=18), "image_size 18 is not a multiple of 4"),
        (dict(widths=(8, 6)), "widths must be multiples of 4"),
        (dict(widths=()), "every size of a CLIP must be at least 1"),
        (dict(text_len=1), "text_len at least 2"),
        (dict(text_heads=3), "text_width 16 is not a multiple of text_heads 3"),
    ],
)
def test_impossible_sizes(change, reason):
    with pytest.raises(UserError, match=reason):
        dataclasses.replace(TEST, **change)


def test_unsuitable_inputs(clip):
    with pytest.raises(UserError, match=r"the caption has 8 tokens and CLIP reads at most 7.*--truncate"):
        clip.pack_text([list(range(8))])
    with pytest.raises(UserError, match="text id 300 is not in the vocabulary of 300"):
        clip.pack_text([[300]])
    with pytest.raises(UserError, match=r"images must be \[B, 3, 16, 16\], not \[2, 3, 16, 8\]"):
        clip.encode_images(torch.rand(2, 3, 16, 8))
    with pytest.raises(UserError, match=r"text must be \[B, 8\].*not \[2, 5\]"):
        clip.encode_text(torch.zeros(2, 5, dtype=torch.int64))


# Batches


def test_shifts_repeat_the_edge(seed):
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    moved = shift(images, np.random.default_rng(seed)).numpy()
    seen = set()
    for before, after in zip(images.numpy(), moved, strict=True):
        padded = np.pad(before, ((0, 0), (2, 2), (2, 2)), mode="edge")
        places = [(y, x) for y, x in product(range(5), repeat=2) if (padded[:, y : y + 32, x : x + 32] == after).all()]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 10


def test_every_image_comes_with_its_reconstruction(directory):
    dvae, source = load_dvae(directory), split(open_source(DATA, 16), "train")
    both = WithReconstructions(source, dvae)
    assert both[3].captions == source[3].captions and both.key(3) == source.key(3)
    with torch.inference_mode():
        expected = torch.cat([source[3].image, to_uint8(dvae.reconstruct(source[3].image[None]))[0]])
    assert torch.equal(both[3].image, expected)


def test_a_step_mixes_images_and_reconstructions_and_repeats_itself(directory, monkeypatch):
    task = CLIPTask(train_config(directory, batch_size=32))
    monkeypatch.setattr(module, "shift", lambda images, rng: images)
    calls = []
    monkeypatch.setattr(task.model, "loss", lambda *inputs: calls.append(inputs) or {})
    for step in (0, 1, 0):
        task.losses(step, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(calls[0], calls[2], strict=True))
    copies = 0
    for images, text, keys in calls[:2]:
        for image, row, i in zip(images, text, keys.tolist(), strict=True):
            both = task.training[i].image
            copies += torch.equal(image, both[3:])
            assert torch.equal(image, both[:3]) or torch.equal(image, both[3:])
            assert task.tokenizer.decode(row[row < task.model.config.text_vocab].tolist()) in task.training.caption(i)
    assert binomial_p(copies, 64, 0.5) > REJECT


def test_the_caption_of_an_unreadable_image_is_not_used(directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    for i in (3, 4):
        damaged = folder / f"{i}.png"
        damaged.write_bytes(damaged.read_bytes()[:100])
    source = WithReconstructions(open_source(str(folder), 16), load_dvae(directory))
    batch = ImageLoader(source, batch_size=8, seed=0).batch(0)
    assert sorted(batch.indices.tolist()) == [0, 1, 2, 5, 5, 5, 6, 7]
    for image, i in zip(batch.images, batch.indices.tolist(), strict=True):
        assert torch.equal(image, source.load(i).image)


# Retrieval


def test_retrieval_by_hand():
    fits = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.2, 0.1], [0.1, 0.15, 0.05]])
    own = torch.eye(3).bool()
    assert [recall(fits, own, k) for k in (1, 2, 5)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [recall(fits.t(), own, k) for k in (1, 2, 3)] == pytest.approx([2 / 3, 2 / 3, 1])
    shared = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    assert recall(fits, shared, 1) == pytest.approx(2 / 3)
    nothing = torch.zeros(3, 3)  # equal scores do not discriminate
    assert [recall(nothing, own, k) for k in (1, 2, 3)] == [0, 0, 1]


# Training


def run_through(config):
    losses = {}
    result = train_clip(config, on_step=lambda p: losses.setdefault(p.step, p.metrics.get("loss")))
    return losses, result


def copy_of(directory, name):
    (directory / name).mkdir()
    for file in ("dvae.json", "dvae.safetensors", "tokenizer.json"):
        (directory / name / file).write_bytes((directory / file).read_bytes())
    return directory / name


def test_clip_resumes_exactly(directory):
    first, second = copy_of(directory, "a"), copy_of(directory, "b")
    whole, result = run_through(train_config(first))
    assert sorted(whole) == [1, 2, 3, 4, 5, 6] and not result.interrupted

    losses = {}

    def stop_after_three(progress):
        losses[progress.step] = progress.metrics["loss"]
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    assert train_clip(train_config(second), on_step=stop_after_three).interrupted
    rest, _ = run_through(train_config(second, resume=True))
    assert losses | rest == whole
    for name in ("clip.safetensors", "clip.run.safetensors"):
        weights, again = read_tensors(first / name)[0], read_tensors(second / name)[0]
        assert weights.keys() == again.keys() and all(torch.equal(weights[key], again[key]) for key in weights)


def test_what_a_run_leaves(directory):
    result = train_clip(train_config(directory))
    assert {f"{what} R@{k}" for what in ("image-to-text", "text-to-image") for k in (1, 5)} == result.evaluation.keys()
    vocab = Tokenizer.load(directory / "tokenizer.json").vocab_size
    assert load_clip(directory).config == dataclasses.replace(TEST, text_vocab=vocab)
    assert sorted(p.name for p in (directory / "samples").iterdir()) == ["clip-0000004.png", "clip-0000006.png"]


def test_clip_learns_which_image_belongs_to_a_caption(clip):
    """Images of one colour each; the caption is its three quantised values. Half of the images are held out."""
    values = torch.cartesian_prod(*[torch.arange(4)] * 3)[torch.randperm(64)]
    images, text = (values / 3)[:, :, None, None].expand(-1, -1, 16, 16), clip.pack_text((values + 10).tolist())
    optimizer = torch.optim.Adam(clip.train().parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        clip.loss(images[:32], text[:32])["loss"].backward()
        optimizer.step()
    assert clip.loss(images[:32], text[:32])["accuracy"].item() > 0.9
    assert clip.loss(images[32:], text[32:])["accuracy"].item() > 0.2  # by chance 1/32


def test_training_reduces_the_loss(directory):
    config = train_config(directory, steps=60, batch_size=16, lr=3e-3, warmup=10, eval_every=0)
    losses, _ = run_through(config)
    assert sum(losses[step] for step in range(51, 61)) / 10 < losses[1] - 0.25


# Invalid input


def test_stages_out_of_order(directory):
    (directory / "tokenizer.json").rename(directory / "kept")
    with pytest.raises(UserError, match=r"holds no tokenizer \(tokenizer.json is missing\): run `dalle tokenize`"):
        train_clip(train_config(directory))
    (directory / "kept").rename(directory / "tokenizer.json")
    (directory / "dvae.json").unlink()
    with pytest.raises(UserError, match="holds no dvae"):
        train_clip(train_config(directory))


def test_a_resumed_run_must_be_of_the_same_dvae_and_captions(directory):
    train_clip(train_config(directory, steps=1))
    with pytest.raises(UserError, match="add --resume to continue it"):
        train_clip(train_config(directory, steps=1))
    with pytest.raises(UserError, match=r"was trained with other captions: resume with the former, or choose"):
        train_clip(train_config(directory, steps=1, resume=True, data="shapes-simple:90"))
    torch.manual_seed(1)
    save_part(directory, "dvae", DiscreteVAE(load_dvae(directory).config))
    with pytest.raises(UserError, match=r"was trained with another dVAE: resume with the former"):
        train_clip(train_config(directory, steps=1, resume=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(batch_size=1), "batch_size must be at least 2 for a contrastive loss, not 1"),
        (dict(lr=0.0), "lr must be positive and finite, not 0.0"),
        (dict(warmup=-1), "warmup must be at least 0, not -1"),
        (dict(weight_decay=-0.1), "weight_decay must be at least 0"),
        (dict(preset="huge"), "no preset 'huge'"),
        (dict(model=dataclasses.replace(TEST, image_size=32, widths=(8,) * 5)), "image_size 16 is not a multiple"),
        (dict(resume=True), "nothing to resume"),
    ],
)
def test_bad_options(directory, change, reason):
    with pytest.raises(UserError, match=reason):
        train_clip(train_config(directory, **change))


def test_the_command(directory, capsys):
    options = ["--data", DATA, "--preset", "test", "--batch-size", "8", "--threads", "1"]
    assert main(["train", "clip", "--out", str(directory), "--steps", "2", *options]) == 0
    assert re.search(r"2 steps, model in .*held-out images: image-to-text R@1 \d", capsys.readouterr().out)
    assert main(["train", "clip", "--out", str(directory / "empty"), *options]) == 2
    assert capsys.readouterr().err.startswith("dalle: ")
