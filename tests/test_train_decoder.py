"""Training of the decoder alone: what stays, what changes, exact resume, and invalid input."""

import os
import signal

import pytest
import torch
from training_for_tests import DATA, assert_same_weights, dvae_config, run_through, run_with_break

from dalle import DiscreteVAE, DiscreteVAEConfig, UserError
from dalle.cli import main
from dalle.data import open_source
from dalle.models.checkpoint import fingerprint, load_dvae, save_part
from dalle.models.dvae import logit_laplace_nll, to_range
from dalle.models.tokens import load_tokens
from dalle.training.tokens import TokenizeConfig, tokenize
from dalle.training.train_decoder import TrainDecoderConfig, train_decoder
from dalle.training.train_dvae import train_dvae

SIZE = DiscreteVAEConfig(16, 32, (8, 16, 16), blocks=1, codebook_dim=8)


@pytest.fixture
def model(tmp_path):
    """A model directory with an untrained dVAE."""
    torch.manual_seed(0)
    (tmp_path / "model").mkdir()
    save_part(tmp_path / "model", "dvae", DiscreteVAE(SIZE))
    return tmp_path / "model"


def config(out, **change):
    defaults = dict(data=DATA, steps=6, batch_size=4, log_every=1, eval_every=4, threads=1, precision="float32")
    return TrainDecoderConfig(out=out, **defaults | change)


def nll(model):
    images = torch.stack([sample.image for sample in open_source(DATA, 16)])
    with torch.no_grad():
        stats = model.decoder.from_codes(model.codes(images))
    return logit_laplace_nll(to_range(images / 255), stats).mean().item()


def test_the_encoder_stays_and_the_decoder_learns(model):
    before = load_dvae(model)
    train_decoder(config(model, steps=60, batch_size=16, eval_every=0))
    after = load_dvae(model)
    assert fingerprint(after.encoder) == fingerprint(before.encoder)
    assert after.config.decoder_size == before.config.decoder_size
    assert nll(after) < nll(before) - 0.2


def test_a_larger_decoder_reads_the_same_codes(model):
    tokenize(TokenizeConfig(out=model, data=DATA))
    codes = load_tokens(model, load_dvae(model))["train"].codes
    train_decoder(config(model, widths=(8, 16, 32), blocks=2))
    dvae = load_dvae(model)
    assert dvae.config.decoder_size == ((8, 16, 32), 2)
    assert dvae.config.widths == SIZE.widths and dvae.config.blocks == 1
    assert torch.equal(load_tokens(model, dvae)["train"].codes, codes)  # no "made with another dVAE"
    assert dvae.decode(codes[:2]).shape == (2, 3, 16, 16)


def test_it_resumes_exactly(model, tmp_path):
    (tmp_path / "copy").mkdir()
    save_part(tmp_path / "copy", "dvae", load_dvae(model))
    losses, _ = run_through(train_decoder, config(model, widths=(8, 8, 32)))
    assert run_with_break(train_decoder, config(tmp_path / "copy", widths=(8, 8, 32)), at=3)[0] == losses
    assert_same_weights(model / "dvae.safetensors", tmp_path / "copy" / "dvae.safetensors")


def test_an_interrupted_run_keeps_the_previous_decoder(model):
    before = fingerprint(load_dvae(model))

    def interrupt(progress):
        os.kill(os.getpid(), signal.SIGINT)

    assert train_decoder(config(model, widths=(8, 8, 32)), on_step=interrupt).interrupted
    assert fingerprint(load_dvae(model)) == before


def test_the_dvae_does_not_resume_after_its_decoder(model):
    train_decoder(config(model))
    with pytest.raises(UserError, match=r"decoder\.run\.safetensors holds a later training run"):
        train_dvae(dvae_config(model, resume=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(widths=(8, 16)), "decoder_widths must have 3 entries, not 2"),
        (dict(widths=(8, 16, 30)), "multiples of 4"),
        (dict(blocks=0), "at least 1"),
        (dict(lr=0.0), "lr must be positive"),
    ],
)
def test_bad_sizes_are_refused(model, change, message):
    with pytest.raises(UserError, match=message):
        train_decoder(config(model, **change))


def test_without_a_dvae_it_says_so(tmp_path, capsys):
    assert main(["train", "decoder", "--out", str(tmp_path / "empty"), "--data", DATA]) == 2
    said = capsys.readouterr().err
    assert "dvae.json" in said and said.count("\n") == 1
