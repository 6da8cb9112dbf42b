"""Parts of different models in one directory, and data replaced between two runs."""

import json
import os
import shutil
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dalle import Pipeline, UserError
from dalle.cli import main
from dalle.files import read_header, read_tensors, write_tensors
from dalle.models.checkpoint import load_dvae
from dalle.models.tokens import load_tokens
from dalle.training.train_decoder import TrainDecoderConfig, train_decoder
from faults.models_for_tests import DATA, SHORT, run_clip, run_dvae, run_prior, run_tokenize


@pytest.fixture
def other(tmp_path):
    """A dVAE of the same configuration with other weights, and a tokenizer with other merges."""
    run_dvae(tmp_path / "other", seed=1)
    run_tokenize(tmp_path / "other", data="shapes-simple:60")
    return tmp_path / "other"


@pytest.fixture
def folder(tmp_path):
    """Images of the same size in bytes and pixels, with captions."""
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / "images" / f"{i:02}.bmp")
        (tmp_path / "images" / f"{i:02}.txt").write_text("an image")
    return tmp_path / "images"


# Parts of one model


def test_a_dvae_is_not_replaced_under_its_prior(model):
    (model / "dvae.run.safetensors").unlink()
    before = (model / "dvae.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds a model \(prior\.json\) of the dVAE, which would be replaced"):
        run_dvae(model)
    assert (model / "dvae.safetensors").read_bytes() == before


@pytest.mark.parametrize("stage", ["prior", "clip"])
def test_models_of_another_dvae(model, other, stage, capsys):
    for suffix in ("json", "safetensors"):
        shutil.copy(other / f"dvae.{suffix}", model)
    if stage == "clip":  # the prior matches
        torch.manual_seed(0)
        run_tokenize(model)
        (model / "prior.run.safetensors").unlink()
        run_prior(model)
    message = rf"{stage}\.safetensors was made with another dVAE.*train the {stage} again"
    with pytest.raises(UserError, match=message):
        Pipeline.from_pretrained(model)
    for command in (
        ["export", "--model", str(model), "--out", str(model.parent / "export")],
        ["evaluate", "--model", str(model), "--data", DATA, "--out", str(model.parent / "evaluation")],
        ["generate", "red", "--model", str(model), "--out", str(model.parent / "grid.png")],
    ):
        assert main(command) == 2
        assert f"{stage}.safetensors was made with another dVAE" in capsys.readouterr().err


def test_a_tokenizer_of_another_model(model, other):
    shutil.copy(other / "tokenizer.json", model)
    with pytest.raises(UserError, match=r"prior\.safetensors was made with another tokenizer"):
        Pipeline.from_pretrained(model)


def test_a_configuration_of_another_model(model):
    """Of two that have weights of the same shapes."""
    path = model / "prior.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"conv_kernel": 5}))
    with pytest.raises(UserError, match=r"prior\.json does not belong to prior\.safetensors"):
        Pipeline.from_pretrained(model)


def test_a_decoder_trained_further_still_belongs(model):
    train_decoder(TrainDecoderConfig(out=model, data=DATA, **SHORT))
    Pipeline.from_pretrained(model)


def test_a_rounded_encoder_belongs_to_the_model_it_is_saved_with(model):
    pipeline = Pipeline.from_pretrained(model)
    pipeline.dvae.half()
    pipeline.save_pretrained(model.parent / "rounded")
    Pipeline.from_pretrained(model.parent / "rounded")


def test_models_of_an_earlier_version_load_with_one_warning(model, capsys):
    for path in (model / "prior.safetensors", model / "clip.safetensors"):
        save_file(load_file(path), path)
    with pytest.warns(UserWarning, match=r"not record .* to prior\.safetensors and clip\.safetensors") as record:
        pipeline = Pipeline.from_pretrained(model)
    assert len(record) == 1
    capsys.readouterr()
    assert main(["generate", "red", "--model", str(model), "--candidates", "1", "--out", str(model / "red.png")]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith(f"dalle: warning: {model} was written by an earlier version")
    pipeline.save_pretrained(model.parent / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pipeline.from_pretrained(model.parent / "again")
        Pipeline.from_pretrained()  # the shipped model


# Data replaced between two runs


def test_an_interrupted_tokenize_over_an_older_one(model, other):
    """tokenizer.json is replaced first; captions and codes are the older ones."""
    shutil.copy(other / "tokenizer.json", model)
    with pytest.raises(UserError, match=r"made with another tokenizer.*run `dalle tokenize` again"):
        run_prior(model, resume=True, steps=3)


def test_codes_of_an_earlier_version_load(model):
    tensors, metadata = read_tensors(model / "codes.safetensors")
    del metadata["tokenizer"]
    write_tensors(model / "codes.safetensors", tensors, metadata)
    assert load_tokens(model, load_dvae(model))["train"].captions


def repaint(folder):
    for i, path in enumerate(sorted(folder.glob("*.bmp"))):
        Image.new("RGB", (16, 16), (0, 20 * i, 0)).save(path)


def rename(folder):
    for path in list(folder.iterdir()):
        path.rename(path.with_stem(f"{99 - int(path.stem):02}"))


@pytest.mark.parametrize("change", [repaint, rename])
@pytest.mark.parametrize("stage", ["dvae", "clip"])
def test_resuming_on_other_images(tmp_path, folder, stage, change):
    out = tmp_path / "model"
    options = dict(data=str(folder), batch_size=2)

    def run(**more):
        return (run_dvae if stage == "dvae" else run_clip)(out, **options, **more)

    if stage == "clip":
        run_dvae(out, **options)
        run_tokenize(out, data=str(folder))
    run()
    assert run(resume=True, steps=3).step == 3
    times = [(path, path.stat().st_mtime_ns) for path in folder.iterdir()]
    change(folder)
    for path, time in times:
        if path.exists():
            os.utime(path, ns=(time, time))
    with pytest.raises(UserError, match=rf"{stage}\.run\.safetensors was trained with other images"):
        run(resume=True, steps=4)


def test_a_checkpoint_of_an_earlier_version_resumes(model):
    path = model / "dvae.run.safetensors"
    tensors, metadata = read_tensors(path)
    identity = json.loads(metadata["identity"])
    del identity["digest of the images"]
    save_file(tensors, path, metadata | {"identity": json.dumps(identity)})
    assert "digest" not in read_header(path)[1]
    assert run_dvae(model, resume=True, steps=3).step == 3
