"""The demo, with a toy model in place of the shipped one, and its prompts."""

import pytest
import torch
from PIL import Image

from dalle import DiscreteVAE, DiscreteVAEConfig, Pipeline, Prior, PriorConfig, images
from dalle.cli import demo, main
from dalle.data import emoji, open_source, split
from dalle.models.clip import CLIP, CLIPConfig
from dalle.tokenizer import Tokenizer

SIDE = 16


@pytest.fixture
def toy(monkeypatch):
    """A tiny untrained model, in place of the shipped one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([*demo.PROMPTS, *demo.HELD_OUT, demo.COMPLETION], 600)
    pipeline = Pipeline(
        DiscreteVAE(DiscreteVAEConfig(SIDE, 32, (8, 8, 16), blocks=1, codebook_dim=8)),
        Prior(PriorConfig(24, tokenizer.vocab_size, (4, 4), 32, layers=2, heads=2, head_dim=16, conv_kernel=3)),
        tokenizer,
        CLIP(CLIPConfig(SIDE, 24, tokenizer.vocab_size, (8, 8), text_width=16, text_layers=1, text_heads=2)),
    )
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda: pipeline)
    return pipeline


def test_prompts_are_from_the_splits_that_the_demo_names(monkeypatch):
    """Captions are Unicode names; only rendering needs the font, which is an optional package."""
    monkeypatch.setattr(emoji, "_check_raqm", lambda: None)
    monkeypatch.setattr(emoji, "find_font", lambda path: path)
    monkeypatch.setattr(emoji, "_has_glyph", lambda text, font: True)
    source = open_source("emoji", 32)
    seen, unseen = set(split(source, "train").captions()), set(split(source, "heldout").captions())
    assert len(demo.PROMPTS) == len(set(demo.PROMPTS)) == 8
    assert {*demo.PROMPTS, demo.COMPLETION} <= seen and set(demo.HELD_OUT) <= unseen


def test_the_demo_generates(capsys, tmp_path, toy):
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    assert f"{demo.CANDIDATES * 11} images" in said and "demo.png" in said and "dalle generate" in said
    grid = Image.open(tmp_path / "demo" / "demo.png")
    assert grid.width == images.MARGIN + demo.CANDIDATES * (demo.SCALE * SIDE + images.MARGIN)


def test_the_completed_row_keeps_the_upper_half(toy):
    rows, labels = demo.generate(toy, seed=3)
    assert len(rows) == len(labels) == len(demo.PROMPTS) + len(demo.HELD_OUT) + 1
    assert all(len(row) == demo.CANDIDATES for row in rows)
    kept = toy.dvae.codes(images.to_tensor(rows[demo.COMPLETED][0])[None])[0, :2]
    again = toy.complete(rows[demo.COMPLETED][0], prompt=demo.COMPLETION, rows=2, candidates=3, seed=3)
    assert all(torch.equal(result.codes[:2], kept) for result in again)


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--out", "/dev/null/demo"]])
def test_bad_input_is_one_line(capsys, toy, arguments):
    assert main(["demo", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dalle: ") and said.count("\n") == 1
