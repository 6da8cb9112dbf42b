"""Training: schedules, order of the images, exact resume, tokens, and invalid checkpoints."""

import errno
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from training_for_tests import DATA, assert_same_weights, dvae_config, run_through, run_with_break

import dalle.files
from dalle import DiscreteVAE, DiscreteVAEConfig, PriorConfig, UserError
from dalle.data import open_source, split
from dalle.data.crops import dvae_crop
from dalle.files import digest, read_tensors, write_tensors, write_text
from dalle.models.checkpoint import load_dvae, load_prior, load_weights, save_part
from dalle.models.dvae import PRESETS as DVAE_PRESETS
from dalle.models.prior import PRESETS as PRIOR_PRESETS
from dalle.models.tokens import load_tokens
from dalle.training import loader
from dalle.training.loader import ImageLoader, batch_indices, choose_caption, drops_caption
from dalle.training.optimizer import adamw, ema
from dalle.training.schedules import cosine, warmup
from dalle.training.tokens import TokenizeConfig, tokenize
from dalle.training.train_dvae import DVAETask, train_dvae
from dalle.training.train_prior import PriorTask, TrainPriorConfig, train_prior
from statistics_for_tests import REJECT, binomial_p, frequencies_p


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    monkeypatch.setitem(DVAE_PRESETS, "test", DiscreteVAEConfig(16, 32, (8, 16, 16), blocks=1, codebook_dim=8))
    prior = PriorConfig(24, 300, (4, 4), 32, layers=2, heads=2, head_dim=16, conv_kernel=3)
    monkeypatch.setitem(PRIOR_PRESETS, "test", prior)


def prior_config(out, **change):
    defaults = dict(preset="test", steps=6, batch_size=4, log_every=1, eval_every=4, threads=1)
    return TrainPriorConfig(out=out, **defaults | change)


@pytest.fixture
def tokenized(tmp_path):
    """A model directory with an untrained dVAE and its codes."""
    torch.manual_seed(0)
    save_part(tmp_path, "dvae", DiscreteVAE(DVAE_PRESETS["test"]))
    tokenize(TokenizeConfig(out=tmp_path, data=DATA))
    return tmp_path


@pytest.fixture
def folder(tmp_path_factory, seed):
    """Twelve images that are larger than the model, with three captions each."""
    root = tmp_path_factory.mktemp("images")
    for i in range(12):
        Image.fromarray(torch.randint(256, (24, 40, 3), dtype=torch.uint8).numpy()).save(root / f"{i}.png")
    lines = [f"{i}.png,{adjective} image {i}\n" for i in range(12) for adjective in ("first", "second", "third")]
    (root / "captions.csv").write_text("".join(["file,caption\n", *lines]))
    return str(root)


# Schedules, order, optimiser


def test_cosine():
    assert [cosine(1, 3, f) for f in (-1, 0, 0.5, 1, 2)] == pytest.approx([1, 1, 2, 3, 3])
    assert cosine(1, 1 / 16, 1 / 3) == pytest.approx(1 / 16 + 15 / 16 * 0.75)
    assert [warmup(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


@settings(max_examples=50)
@given(size=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_every_epoch_is_a_permutation(size, batch_size, seed):
    steps = 3 * size // batch_size + 2
    batches = [batch_indices(size, batch_size, seed, step) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    stream = torch.cat(batches)
    for epoch in range(len(stream) // size):
        assert sorted(stream[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


def test_order_depends_on_the_seed_and_changes_by_epoch():
    orders = [tuple(batch_indices(50, 50, seed, step).tolist()) for seed in (0, 1) for step in (0, 1)]
    assert len(set(orders)) == 4


def test_images_that_are_not_cached_are_the_same(monkeypatch):
    source = split(open_source(DATA, 16), "train")
    decoded = ImageLoader(source, 3, seed=5)
    monkeypatch.setattr(loader, "CACHE_BYTES", 0)
    loaded = ImageLoader(source, 3, seed=5)
    for step in (0, 1, 2, 7, 3):
        assert all(map(torch.equal, decoded.batch(step), loaded.batch(step)))


def test_one_caption_of_an_image_is_sampled_for_every_step(seed):
    captions = ["one", "two", "three"]
    sampled = [choose_caption(captions, seed, step, index) for step in range(100) for index in range(30)]
    assert sampled == [choose_caption(captions, seed, step, index) for step in range(100) for index in range(30)]
    assert frequencies_p([sampled.count(caption) for caption in captions], [1 / 3] * 3) > REJECT
    for at in (0, 1):  # over the steps of an image, and over the images of a step; one caption is missing with p = 5e-9
        assert {choose_caption(captions, seed, *((i, 7), (7, i))[at]) for i in range(50)} == set(captions)


def test_captions_are_dropped_at_a_rate(seed):
    choices = [(step, index) for step in range(100) for index in range(30)]
    dropped = [drops_caption(0.1, seed, *choice) for choice in choices]
    assert dropped == [drops_caption(0.1, seed, *choice) for choice in choices]
    assert binomial_p(sum(dropped), len(dropped), 0.1) > REJECT
    assert not any(drops_caption(0.0, seed, *choice) for choice in choices)
    assert all(drops_caption(1.0, seed, *choice) for choice in choices)


def test_decay_spares_gains_biases_and_embeddings():
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 5), torch.nn.LayerNorm(5))
    decayed, spared = adamw(model, (0.9, 0.96), 0.045).param_groups
    assert decayed["weight_decay"] == 0.045 and [p.shape for p in decayed["params"]] == [(5, 4)]
    assert spared["weight_decay"] == 0.0 and len(spared["params"]) == 4


def test_ema_by_hand(seed):
    model = torch.nn.Linear(3, 2)
    averaged = ema(model, 0.9)
    expected = None
    for n in range(40):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        averaged.update_parameters(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = model.weight.detach().clone() if n == 0 else decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(averaged.module.weight, expected)


# Runs


def test_dvae_resumes_exactly(tmp_path):
    losses, result = run_through(train_dvae, dvae_config(tmp_path / "a"))
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and result.step == 6 and not result.interrupted
    assert run_with_break(train_dvae, dvae_config(tmp_path / "b"), at=3)[0] == losses
    assert_same_weights(tmp_path / "a/dvae.safetensors", tmp_path / "b/dvae.safetensors")
    assert_same_weights(tmp_path / "a/dvae.run.safetensors", tmp_path / "b/dvae.run.safetensors")


def test_dvae_resumes_exactly_on_crops(tmp_path, folder):
    losses, _ = run_through(train_dvae, dvae_config(tmp_path / "a", data=folder))
    assert run_with_break(train_dvae, dvae_config(tmp_path / "b", data=folder), at=3)[0] == losses
    assert_same_weights(tmp_path / "a/dvae.safetensors", tmp_path / "b/dvae.safetensors")
    centred, _ = run_through(train_dvae, dvae_config(tmp_path / "c", data=folder, crops="center"))
    assert centred[1] != losses[1]


@pytest.mark.parametrize("several", [False, True])
def test_prior_resumes_exactly(tokenized, tmp_path, folder, several):
    if several:
        tokenize(TokenizeConfig(out=tokenized, data=folder, crops=2))
    files = ("dvae.json", "dvae.safetensors", "codes.safetensors", "captions.json", "tokenizer.json")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes((tokenized / file).read_bytes())
    losses, _ = run_through(train_prior, prior_config(tmp_path / "a"))
    assert run_with_break(train_prior, prior_config(tmp_path / "b"), at=2)[0] == losses
    assert_same_weights(tmp_path / "a/prior.safetensors", tmp_path / "b/prior.safetensors")


def test_what_a_dvae_run_leaves(tmp_path):
    result = train_dvae(dvae_config(tmp_path, tensorboard=True))
    assert {"nll", "psnr", "codes used", "code perplexity"} == result.evaluation.keys()
    assert load_dvae(tmp_path).config == DVAE_PRESETS["test"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["dvae-0000004.png", "dvae-0000006.png"]
    assert list((tmp_path / "curves").iterdir())
    assert not [p for p in tmp_path.rglob("*.tmp")]


def test_a_prior_learns_from_images_without_their_captions(tokenized):
    """With all captions dropped it depends on none of them."""
    task = PriorTask(prior_config(tokenized, caption_dropout=1.0))
    before = task.losses(3, 0.5)
    task.training.captions[:] = [["another"]] * len(task.training.captions)
    for name, value in task.losses(3, 0.5).items():
        assert torch.equal(value, before[name])


def test_what_a_prior_run_leaves(tokenized):
    result = train_prior(prior_config(tokenized))
    assert {"loss", "text", "image"} == result.evaluation.keys()
    config = load_prior(tokenized).config
    assert config.grid == (4, 4) and config.image_vocab == 32 and config.layers == 2
    assert (tokenized / "samples/prior-0000006.png").exists()


def test_training_reduces_the_loss(tmp_path):
    losses, _ = run_through(train_dvae, dvae_config(tmp_path, steps=60, batch_size=16, eval_every=0))
    assert sum(losses[step] for step in range(51, 61)) / 10 < losses[1] - 0.25


def test_a_time_budget_runs_the_schedules_to_their_end(tmp_path):
    fractions = []
    result = train_dvae(
        dvae_config(tmp_path, steps=1, minutes=0.02, eval_every=0), on_step=lambda p: fractions.append(p.fraction)
    )
    assert result.step > 1 and fractions == sorted(fractions) and fractions[-1] == 1.0
    assert float(read_tensors(tmp_path / "dvae.run.safetensors")[1]["elapsed"]) >= 1.2


def test_non_finite_losses_stop_the_run_and_keep_the_checkpoint(tmp_path):
    with pytest.raises(UserError, match="try a smaller --lr"):
        train_dvae(dvae_config(tmp_path, lr=1e12, steps=100, save_every=1, eval_every=0))
    run = tmp_path / "dvae.run.safetensors"
    assert not run.exists() or all(t.isfinite().all() for t in read_tensors(run)[0].values())


# Invalid directories


def test_a_run_is_not_overwritten(tmp_path):
    train_dvae(dvae_config(tmp_path, steps=1))
    with pytest.raises(UserError, match="add --resume to continue it"):
        train_dvae(dvae_config(tmp_path, steps=1))


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="nothing to resume: omit --resume"):
        train_dvae(dvae_config(tmp_path, resume=True))


def test_another_configuration(tmp_path):
    train_dvae(dvae_config(tmp_path, steps=1))
    with pytest.raises(UserError, match=r"batch_size = 4, not 5.*resume with the former, or choose another directory"):
        train_dvae(dvae_config(tmp_path, steps=1, resume=True, batch_size=5))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_checkpoint(tmp_path, keep):
    train_dvae(dvae_config(tmp_path, steps=1))
    run = tmp_path / "dvae.run.safetensors"
    run.write_bytes(run.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        train_dvae(dvae_config(tmp_path, resume=True))


def test_a_foreign_checkpoint(tmp_path):
    write_tensors(tmp_path / "dvae.run.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(UserError, match="not a training checkpoint of this version"):
        train_dvae(dvae_config(tmp_path, resume=True))


def rename_in_identity(path, old, new):
    """Renames `new` to `old`, as in checkpoints of earlier versions."""
    tensors, metadata = read_tensors(path)
    assert any(name.startswith("average.module.") for name in tensors)
    identity = json.loads(metadata["identity"])
    identity[old] = identity.pop(new)
    write_tensors(path, tensors, metadata | {"identity": json.dumps(identity)})


def test_a_dvae_checkpoint_with_old_names_resumes(tmp_path):
    train_dvae(dvae_config(tmp_path, steps=1))
    rename_in_identity(tmp_path / "dvae.run.safetensors", "pictures", "images")
    assert train_dvae(dvae_config(tmp_path, steps=2, resume=True)).step == 2


def test_a_prior_checkpoint_with_old_names_resumes(tokenized):
    train_prior(prior_config(tokenized, steps=1))
    rename_in_identity(tokenized / "prior.run.safetensors", "average_decay", "ema_decay")
    with pytest.raises(UserError, match=r"ema_decay = 0\.999, not 0\.5"):
        train_prior(prior_config(tokenized, steps=2, resume=True, ema_decay=0.5))
    assert train_prior(prior_config(tokenized, steps=2, resume=True)).step == 2


def test_an_out_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a directory that can be written to"):
        train_dvae(dvae_config(tmp_path / "file"))


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"x": torch.ones(3)})

    def full(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dalle.files, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*intact"):
        write_tensors(path, {"x": torch.zeros(3)})
    assert torch.equal(read_tensors(path)[0]["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_real_limit_on_file_size(tmp_path):
    """The kernel refuses to write beyond 100 kB, as it would on a full disk."""
    write_text(tmp_path / "w.safetensors", "previous")
    script = (
        "import sys, torch; from dalle import UserError; from dalle.files import write_tensors\n"
        "try: write_tensors(sys.argv[1], {'x': torch.zeros(10**6)})\n"
        "except UserError as error: print(error); sys.exit(2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "w.safetensors")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "cannot be written" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "w.safetensors").read_text() == "previous" and len(list(tmp_path.iterdir())) == 1


def test_weights_of_another_shape(tmp_path):
    with pytest.raises(UserError, match=r"belongs to another configuration: bias is \[3\] there and \[2\] here"):
        load_weights(torch.nn.Linear(4, 2), torch.nn.Linear(4, 3).state_dict(), "w.safetensors")
    with pytest.raises(UserError, match="bias is absent there"):
        load_weights(torch.nn.Linear(4, 2), {"weight": torch.zeros(2, 4)}, "w.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(steps=0), "steps must be at least 1, not 0"),
        (dict(batch_size=-2), "batch_size must be at least 1, not -2"),
        (dict(minutes=0.0), "minutes must be positive"),
        (dict(minutes=math.nan), "minutes must be positive"),
        (dict(seed=-1), "seed must be in"),
        (dict(threads=0), "threads must be at least 1"),
        (dict(device="abacus"), "device must be one that this PyTorch can use; got 'abacus'"),
        (dict(device="meta"), "device 'meta' cannot be used"),
        (dict(preset="huge"), "no preset 'huge'"),
    ],
)
def test_bad_options(tmp_path, change, reason):
    with pytest.raises(UserError, match=reason):
        train_dvae(dvae_config(tmp_path, **change))


# Tokens


def test_tokens_are_the_codes_of_the_images(tokenized):
    dvae = load_dvae(tokenized)
    source = open_source(DATA, 16)
    for part, tokens in load_tokens(tokenized, dvae).items():
        view = split(source, part)
        assert tokens.captions == [[caption] for caption in view.captions()]
        assert len(tokens.keys) == len(view) == len(tokens.codes)
        for i in range(0, len(view), 5):
            assert torch.equal(tokens.codes[i], dvae.codes(view[i].image[None])[0])


def test_tokens_of_crops_with_several_captions(tokenized, folder):
    tokens = tokenize(TokenizeConfig(out=tokenized, data=folder, crops=3))
    for part, count in {"train": 3, "heldout": 1}.items():
        assert len(tokens[part].codes) == count * len(split(open_source(folder, 16), part))
    for part in tokens.values():
        for key, captions in zip(part.keys, part.captions, strict=True):
            assert captions == [f"{adjective} image {key[:-4]}" for adjective in ("first", "second", "third")]
    assert load_tokens(tokenized, load_dvae(tokenized))["train"].captions == tokens["train"].captions


def test_captions_of_an_earlier_version_are_refused(tokenized):
    dvae = load_dvae(tokenized)
    listing = {part: {"captions": ["x"] * n, "keys": ["k"] * n} for part, n in (("train", 38), ("heldout", 2))}
    text = json.dumps(listing)
    write_text(tokenized / "captions.json", text)
    codes, metadata = read_tensors(tokenized / "codes.safetensors")
    write_tensors(tokenized / "codes.safetensors", codes, metadata | {"captions": digest(text)})
    with pytest.raises(UserError, match="of an earlier version: run `dalle tokenize` again"):
        load_tokens(tokenized, dvae)


def test_codes_of_another_dvae_are_refused(tokenized):
    torch.manual_seed(1)
    save_part(tokenized, "dvae", DiscreteVAE(DVAE_PRESETS["test"]))
    with pytest.raises(UserError, match="made with another dVAE"):
        train_prior(prior_config(tokenized))


def test_captions_that_do_not_belong_are_refused(tokenized):
    captions = tokenized / "captions.json"
    captions.write_text(captions.read_text().replace("red", "blue"))
    with pytest.raises(UserError, match=r"does not belong to codes\.safetensors"):
        train_prior(prior_config(tokenized))


def test_stages_out_of_order(tmp_path):
    with pytest.raises(UserError, match="holds no dvae"):
        tokenize(TokenizeConfig(out=tmp_path, data=DATA))
    save_part(tmp_path, "dvae", DiscreteVAE(DVAE_PRESETS["test"]))
    with pytest.raises(UserError, match="run `dalle tokenize` first"):
        train_prior(prior_config(tmp_path))


def test_an_unreadable_image_is_left_out_not_doubled(tokenized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(6):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    damaged = folder / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    parts = tokenize(TokenizeConfig(out=tokenized, data=str(folder)))
    keys = [key for part in parts.values() for key in part.keys]
    assert len(keys) == len(set(keys)) == 5 and not any("2.png" in key for key in keys)
    assert sum(len(part.codes) for part in parts.values()) == 5
    assert any("2.png" in name for part in parts.values() for name, _ in part.skipped)


def test_a_held_out_image_that_cannot_be_read_is_not_replaced_by_another(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(60):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    held_out = split(open_source(str(folder), 16), "heldout")
    damaged = folder / held_out.key(0)
    damaged.write_bytes(damaged.read_bytes()[:100])
    task = DVAETask(dvae_config(tmp_path / "model", data=str(folder)))
    expected = [held_out[i].image for i in range(1, len(held_out))]
    assert expected and len(task.held_out) == len(expected)
    assert all(map(torch.equal, task.held_out, expected))
    assert task.skipped == [(damaged.name, task.skipped[0][1])]


def test_a_batch_names_the_images_it_holds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    source = open_source(str(folder), 16)
    for i in (1, 2, 5):
        (folder / f"{i}.png").write_bytes(b"")
    for crop in (None, dvae_crop):
        batch = ImageLoader(source, 6, seed=0, crop=crop).batch(0)
        asked = batch_indices(6, 6, 0, 0).tolist()
        assert batch.indices.tolist() == [{1: 3, 2: 3, 5: 0}.get(i, i) for i in asked]
        assert batch.images[:, 0, 0, 0].tolist() == [40 * i for i in batch.indices.tolist()]
    assert sorted(name for name, _ in source.skipped) == ["1.png", "2.png", "5.png"]
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="none of the 6 images can be read"):
        ImageLoader(source, 6, seed=0)


def test_a_prior_does_not_resume_on_other_captions(tokenized):
    train_prior(prior_config(tokenized, steps=2))
    with pytest.raises(UserError, match="holds a model of other captions"):
        tokenize(TokenizeConfig(out=tokenized, data="shapes-simple:44"))
    (tokenized / "prior.json").unlink()
    tokenize(TokenizeConfig(out=tokenized, data="shapes-simple:44"))
    with pytest.raises(UserError, match="was trained with other captions"):
        train_prior(prior_config(tokenized, steps=2, resume=True))


def test_others_may_read_weights_as_the_umask_says(tmp_path):
    for umask in (0o022, 0o077):
        previous = os.umask(umask)
        try:
            write_tensors(tmp_path / "w.safetensors", {"w": torch.ones(2)})
        finally:
            os.umask(previous)
        assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
