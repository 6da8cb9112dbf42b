"""Whatever fails after work was done, the work is kept; and one directory has one writer."""

import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont
from torch.optim.swa_utils import AveragedModel
from training_for_tests import assert_same_weights

from dalle import UserError, images
from dalle.cli.output import png_path
from dalle.files import sole_writer, write_text
from dalle.images import image_grid, save_png
from dalle.training import loader
from dalle.training.loop import train
from dalle.training.train_dvae import DVAETask, TrainDVAEConfig
from faults.models_for_tests import DATA, DVAE, SHORT, run_clip, run_dvae, run_prior, run_tokenize

# Labels


class Font:
    """Counts the characters that are measured. Every character is seven pixels wide."""

    def __init__(self):
        self.measured = 0

    def getlength(self, text):
        self.measured += len(text)
        return 7 * len(text)


@pytest.mark.parametrize("length", [1, 99, 100, 4000, 10**6])
def test_a_label_is_cut_before_it_is_measured(length):
    font = Font()
    label = images._fit("ab" * length, font, 700)
    assert label == ("ab" * length)[:99] + "…" if length > 50 else "ab" * length
    assert font.measured < 20 * 700


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.integers(1, 200))
def test_the_longest_beginning_that_fits(text, width):
    font = ImageFont.load_default(size=10)
    text = " ".join(text.split())[:width]
    label = images._fit(text, font, width)
    if label != text:
        assert label.endswith("…") and (font.getlength(label) <= width or label == "…")
        longer = text[: len(label)] + "…"
        assert font.getlength(longer) > width


@pytest.mark.parametrize("label", ["a " * 500_000, "\n" * 1000, "é\u0301" * 3000, "\0", "👩‍🚀" * 999, "line\nbreak"])
def test_no_label_costs_the_image(label):
    assert image_grid([[torch.zeros(3, 16, 16)]], [label]).width == 20


def test_samples_of_long_captions(tmp_path):
    """Captions as long as a data folder may have them."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("ab " * 21_000)
    run_dvae(tmp_path / "model", data=str(folder))
    run_tokenize(tmp_path / "model", data=str(folder))
    run_prior(tmp_path / "model")
    assert (tmp_path / "model/samples/prior-0000002.png").exists()


# Names


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "é" * 125 + ".png"])
def test_a_name_as_long_as_the_file_system_allows(tmp_path, name):
    save_png(Image.new("RGB", (2, 2)), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a" * 256, "file/name", "missing/name"])
def test_a_path_that_cannot_be_written_is_an_error_of_the_user(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / name, "text")


def test_an_image_is_written_through_a_symbolic_link(tmp_path):
    (tmp_path / "link.png").symlink_to("target.png")
    for colour in ("red", "blue"):
        save_png(Image.new("RGB", (2, 2), colour), tmp_path / "link.png")
        assert (tmp_path / "link.png").is_symlink()
        assert Image.open(tmp_path / "target.png").getpixel((0, 0)) == ((255, 0, 0) if colour == "red" else (0, 0, 255))


@pytest.mark.parametrize("target", ["loop.png", "missing/grid.png", "folder.png"])
def test_a_link_to_where_nothing_can_be_written_is_noticed_at_once(tmp_path, target):
    (tmp_path / "folder.png").mkdir()
    path = tmp_path / "loop.png"
    path.symlink_to(target)
    with pytest.raises(UserError, match=r"loop\.png (cannot be written|is a directory)"):
        png_path(path)


def test_resuming_in_a_mistyped_directory_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        run_dvae(tmp_path / "typo", resume=True)
    assert not list(tmp_path.iterdir())


# Data and directories that vanish


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images that are read again at every use."""
    monkeypatch.setattr(loader, "CACHE_BYTES", 0)
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text("an image")
    return tmp_path / "images"


def at_step(step, action):
    return lambda progress: action() if progress.step == step else None


def test_images_that_vanish_cost_no_step(tmp_path, folder):
    away, options = tmp_path / "away", dict(data=str(folder), steps=8)
    run_dvae(tmp_path / "whole", **options)
    match = r"none of the 12 images can be read .*; a checkpoint of step [45] is saved: .* --resume"
    with pytest.raises(UserError, match=match):
        run_dvae(tmp_path / "broken", at_step(4, lambda: folder.rename(away)), **options)
    away.rename(folder)
    assert run_dvae(tmp_path / "broken", resume=True, **options).step == 8
    assert_same_weights(tmp_path / "whole/dvae.safetensors", tmp_path / "broken/dvae.safetensors")
    assert_same_weights(tmp_path / "whole/dvae.run.safetensors", tmp_path / "broken/dvae.run.safetensors")


def test_an_output_directory_that_vanishes_is_made_again(tmp_path):
    run_dvae(tmp_path / "whole", steps=4, save_every=3)
    run_dvae(tmp_path / "out", at_step(2, lambda: shutil.rmtree(tmp_path / "out")), steps=4, save_every=3)
    assert_same_weights(tmp_path / "whole/dvae.run.safetensors", tmp_path / "out/dvae.run.safetensors")


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path):
    def replace_by_a_file():
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").write_text("in the way")

    with pytest.raises(UserError, match=r"cannot be written either, so that the last 3 steps are lost"):
        run_dvae(tmp_path / "out", at_step(2, replace_by_a_file), steps=4, save_every=3)


@pytest.mark.parametrize("part", ["optimizer", "ema"])
def test_a_half_done_update_is_not_saved(tmp_path, monkeypatch, part):
    """The error comes within the third update, after `part` was updated."""
    owner, name = {"optimizer": (torch.optim.AdamW, "step"), "ema": (AveragedModel, "update_parameters")}[part]
    update, calls = getattr(owner, name), iter(range(2))

    def fail(*arguments, **options):
        update(*arguments, **options)
        if next(calls, None) is None:
            raise RuntimeError("out of memory")

    run_dvae(tmp_path / "whole", steps=4, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_dvae(tmp_path / "broken", steps=4, save_every=2)
    run_dvae(tmp_path / "broken", resume=True, steps=4, save_every=2)
    assert_same_weights(tmp_path / "whole" / "dvae.run.safetensors", tmp_path / "broken" / "dvae.run.safetensors")


def test_what_could_not_be_resumed_is_not_saved(tmp_path):
    """Gradients so large that their squares overflow, which the weights survive."""

    class Huge(DVAETask):
        def losses(self, step, fraction):
            return {name: 1e27 * value for name, value in super().losses(step, fraction).items()}

    config = TrainDVAEConfig(out=tmp_path, model=DVAE, data=DATA, **SHORT)
    with pytest.raises(UserError, match="no longer finite"):
        train(Huge(config), config, {})
    assert not (tmp_path / "dvae.run.safetensors").exists()


def test_an_error_of_another_kind_keeps_the_steps_and_its_traceback(tmp_path):
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_dvae(tmp_path, at_step(3, fail), steps=4)
    assert run_dvae(tmp_path, resume=True, steps=4).step == 4


# One writer


def attempt(run, **options):
    with pytest.raises(UserError, match=r"another process is writing .*: wait until it ends, or choose another"):
        run(**options)


def test_a_second_training_is_refused(model):
    """In the same directory: of the same part, and of the decoder, which writes the dVAE too. Other parts may train."""
    seen = []

    def meanwhile():
        attempt(run_prior, out=model, resume=True, steps=4)
        attempt(run_prior, out=model)
        run_clip(model, resume=True, steps=3)
        seen.append(True)

    run_prior(model, at_step(3, meanwhile), resume=True, steps=4)
    assert seen
    with sole_writer(model, "dvae"):
        attempt(run_dvae, out=model, resume=True, steps=3)
    with sole_writer(model, "tokenizer"):
        attempt(run_tokenize, out=model)


def test_temporary_files_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".dvae.safetensors.7.tmp").touch()  # another model's
    mine = [".dvae.run.safetensors.7.tmp", "samples/.dvae-0000001.png.7.tmp", ".decoder.run.safetensors.7.tmp"]
    others = ".prior.safetensors.7.tmp"  # of a training that may be at work
    for name in (*mine, others):
        (tmp_path / name).touch()
    run_dvae(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.tmp")) == [".dvae.safetensors.7.tmp", others]


def test_samples_in_another_place_are_not_swept(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".dvae-0000001.png.7.tmp").touch()
    (tmp_path / "samples").symlink_to(elsewhere)
    with sole_writer(tmp_path, "dvae"):
        assert list(elsewhere.iterdir())


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("kept")
    (tmp_path / ".dvae.lock").symlink_to(precious)
    with pytest.raises(UserError, match=r"\.dvae\.lock cannot be written"), sole_writer(tmp_path, "dvae"):
        pass
    assert precious.read_text() == "kept"


def test_a_lock_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / ".dvae.lock")
    with pytest.raises(UserError, match=r"\.dvae\.lock is not a regular file"), sole_writer(tmp_path, "dvae"):
        pass
