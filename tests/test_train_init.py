"""`--init`: training and tokenization that start from another model."""

import dataclasses
import json

import pytest
import torch
from training_for_tests import DATA, assert_same_weights, dvae_config, run_with_break

from dalle import cli
from dalle.errors import UserError
from dalle.files import read_tensors, write_tensors
from dalle.models.checkpoint import load_clip, load_dvae, load_prior, made_with, save_part
from dalle.models.clip import CLIP, CLIPConfig
from dalle.models.dvae import DiscreteVAE, DiscreteVAEConfig
from dalle.models.hub import SHIPPED
from dalle.models.prior import Prior, PriorConfig
from dalle.tokenizer import Tokenizer
from dalle.training.tokens import TokenizeConfig, tokenize
from dalle.training.train_clip import CLIPTask, TrainCLIPConfig
from dalle.training.train_decoder import TrainDecoderConfig, train_decoder
from dalle.training.train_dvae import DVAETask, train_dvae
from dalle.training.train_prior import PriorTask, TrainPriorConfig, train_prior

DVAE = DiscreteVAEConfig(16, 32, (8, 16, 16), blocks=1, codebook_dim=8)
OTHER_DATA = "shapes-simple:44"


def train_config(config_class, out, **change):
    defaults = dict(steps=4, batch_size=4, log_every=1, eval_every=0, threads=1)
    return config_class(out=out, **defaults | change)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An untrained model with all parts."""
    torch.manual_seed(5)
    directory = tmp_path_factory.mktemp("trained")
    dvae = DiscreteVAE(DVAE)
    save_part(directory, "dvae", dvae)
    tokenize(TokenizeConfig(out=directory, data=DATA, text_vocab=280))
    vocab, belongs = Tokenizer.load(directory / "tokenizer.json").vocab_size, made_with(directory, dvae)
    prior = PriorConfig(24, vocab, (4, 4), 32, layers=2, heads=2, head_dim=16, conv_kernel=3)
    save_part(directory, "prior", Prior(prior), belongs)
    clip = CLIPConfig(16, 16, vocab, (8, 16), text_width=16, text_layers=1, text_heads=2, embedding_dim=8)
    save_part(directory, "clip", CLIP(clip), belongs)
    return directory


def assert_same(model, other):
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dvae(trained, tmp_path):
    config = dvae_config(tmp_path, init=str(trained), preset="tiny")
    assert_same(DVAETask(config).model, load_dvae(trained))
    train_dvae(config)
    assert load_dvae(tmp_path).config == DVAE
    before, after = (load_dvae(directory).state_dict() for directory in (trained, tmp_path))
    assert not any(torch.equal(before[name], after[name]) for name in ("encoder.input.weight", "decoder.output.bias"))


def test_resumes_exactly_from_the_same_weights_alone(trained, tmp_path):
    config = dvae_config(tmp_path / "broken", init=str(trained), preset="tiny")
    run_with_break(train_dvae, config, at=3)
    train_dvae(dataclasses.replace(config, out=tmp_path / "whole"))
    assert_same_weights(tmp_path / "broken" / "dvae.safetensors", tmp_path / "whole" / "dvae.safetensors")
    (tmp_path / "other").mkdir()
    save_part(tmp_path / "other", "dvae", DiscreteVAE(DVAE))
    for change in (dict(init=str(tmp_path / "other")), dict(init=None, model=DVAE)):
        with pytest.raises(UserError, match="was trained with other initial weights"):
            train_dvae(dataclasses.replace(config, resume=True, **change))


def test_decoder(trained, tmp_path):
    config = train_config(TrainDecoderConfig, tmp_path, init=str(trained), data=DATA)
    train_decoder(config)
    assert_same(load_dvae(tmp_path).encoder, load_dvae(trained).encoder)
    with pytest.raises(AssertionError):
        assert_same(load_dvae(tmp_path).decoder, load_dvae(trained).decoder)
    (tmp_path / "decoder.run.safetensors").unlink()
    with pytest.raises(UserError, match="holds a dVAE, which would be replaced: choose another --out, or omit --init"):
        train_decoder(config)


def test_prior_on_new_images_with_its_tokenizer(trained, tmp_path):
    tokenize(TokenizeConfig(out=tmp_path, init=str(trained), data=OTHER_DATA))
    for name in ("tokenizer.json", "dvae.json", "dvae.safetensors"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()
    config = train_config(TrainPriorConfig, tmp_path, init=str(trained))
    assert_same(PriorTask(config).model, load_prior(trained))
    train_prior(config)
    assert load_prior(tmp_path).config == load_prior(trained).config
    _, metadata = read_tensors(tmp_path / "prior.safetensors")
    assert metadata["tokenizer"] == made_with(trained, load_dvae(trained))["tokenizer"]


def test_checkpoints_without_the_option_resume(trained, tmp_path):
    tokenize(TokenizeConfig(out=tmp_path, init=str(trained), data=DATA))
    config = train_config(TrainPriorConfig, tmp_path, model=load_prior(trained).config, steps=2)
    train_prior(config)
    path = tmp_path / "prior.run.safetensors"
    tensors, metadata = read_tensors(path)
    identity = json.loads(metadata["identity"])
    del identity["new_tokenizer"]
    write_tensors(path, tensors, metadata | {"identity": json.dumps(identity)})
    assert train_prior(dataclasses.replace(config, resume=True, steps=3)).step == 3


def test_new_tokenizer_only_where_it_is_asked_for(trained, tmp_path):
    tokenize(TokenizeConfig(out=tmp_path, init=str(trained), data=OTHER_DATA, text_vocab=290))
    assert Tokenizer.load(tmp_path / "tokenizer.json") != Tokenizer.load(trained / "tokenizer.json")
    config = train_config(TrainPriorConfig, tmp_path, init=str(trained))
    with pytest.raises(UserError, match=r"has another tokenizer than .* add --new-tokenizer"):
        PriorTask(config)
    model, trained_prior = PriorTask(dataclasses.replace(config, new_tokenizer=True)).model, load_prior(trained)
    new, old = model.config.text_vocab, trained_prior.config.text_vocab
    assert new == Tokenizer.load(tmp_path / "tokenizer.json").vocab_size != old
    ours, theirs = model.state_dict(), trained_prior.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {"text_embedding.weight", "text_head.weight", "text_head.bias"}
    assert torch.equal(ours["text_embedding.weight"][new:], theirs["text_embedding.weight"][old:])
    model.loss(model.pack_text([[new - 1]]), torch.zeros(1, 16, dtype=torch.int64))["loss"].backward()


def test_clip(trained, tmp_path):
    tokenize(TokenizeConfig(out=tmp_path, init=str(trained), data=OTHER_DATA))
    config = train_config(TrainCLIPConfig, tmp_path, init=str(trained), data=OTHER_DATA)
    assert_same(CLIPTask(config).model, load_clip(trained))
    (tmp_path / "new").mkdir()
    tokenize(TokenizeConfig(out=tmp_path / "new", init=str(trained), data=OTHER_DATA, text_vocab=290))
    config = dataclasses.replace(config, out=tmp_path / "new")
    with pytest.raises(UserError, match="add --new-tokenizer"):
        CLIPTask(config)
    clip = CLIPTask(dataclasses.replace(config, new_tokenizer=True)).model
    assert_same(clip.image, load_clip(trained).image)
    assert torch.equal(clip.text.embedding.weight[-1], load_clip(trained).text.embedding.weight[-1])
    save_part(tmp_path, "dvae", DiscreteVAE(dataclasses.replace(DVAE, image_size=32)))
    with pytest.raises(UserError, match=r"reads images of 16 pixels and the dVAE of .* has 32"):
        CLIPTask(dataclasses.replace(config, out=tmp_path))


def test_a_dvae_alone_gets_a_new_tokenizer(trained, tmp_path):
    (tmp_path / "dvae").mkdir()
    save_part(tmp_path / "dvae", "dvae", load_dvae(trained))
    tokenize(TokenizeConfig(out=tmp_path / "out", init=str(tmp_path / "dvae"), data=DATA))
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.json").vocab_size > 290


def test_refusals(trained, tmp_path):
    torch.manual_seed(6)
    save_part(tmp_path, "dvae", DiscreteVAE(DVAE))
    tokenize(TokenizeConfig(out=tmp_path, data=DATA))
    init = str(trained)
    for task, config, message in (
        (tokenize, TokenizeConfig(out=tmp_path, init=init, data=DATA), "holds another dVAE than .* another --out"),
        (tokenize, TokenizeConfig(out=trained, init=init, data=DATA), "is --out itself"),
        (PriorTask, train_config(TrainPriorConfig, tmp_path, init=init), "generates codes of another dVAE than"),
        (PriorTask, train_config(TrainPriorConfig, tmp_path, init=init, preset="small"), "omit --preset or --init"),
        (DVAETask, dvae_config(tmp_path, init=init, preset="tiny", model=DVAE), "omit --model or --init"),
        (DVAETask, dvae_config(tmp_path, init="nowhere", preset="tiny"), "nowhere does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            task(config)


def test_shipped_model(tmp_path):
    tokenize(TokenizeConfig(out=tmp_path, init="shipped", data="shapes-simple:12"))
    task = PriorTask(train_config(TrainPriorConfig, tmp_path, init="shipped"))
    assert_same(task.model, load_prior(SHIPPED))


def test_command(trained, tmp_path, capsys):
    options = ["--init", str(trained), "--data", DATA]
    assert cli.main(["tokenize", "--out", str(tmp_path), *options]) == 0
    training = ["train", "prior", "--out", str(tmp_path), "--init", str(trained), "--steps", "2", "--eval-every", "0"]
    assert cli.main([*training, "--batch-size", "2", "--preset", "small"]) == 2
    assert "omit --preset or --init" in capsys.readouterr().err
    assert cli.main([*training, "--batch-size", "2", "--model.layers", "3"]) == 2
    assert "omit --model or --init" in capsys.readouterr().err
    assert cli.main([*training, "--batch-size", "2"]) == 0
