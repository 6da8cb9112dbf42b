"""The demo: end to end on a model of toy size, resumed, interrupted, and without an emoji font."""

import pytest
import torch
from PIL import Image

from dalle import DiscreteVAEConfig, PriorConfig, UserError, images
from dalle.cli import demo, main
from dalle.data import emoji, open_source, split
from dalle.data.shapes import COLOURS
from dalle.dvae import PRESETS as DVAE_PRESETS
from dalle.prior import PRESETS as PRIOR_PRESETS
from dalle.training.loop import Result


@pytest.fixture
def toy(monkeypatch):
    """Presets of toy size, and few pictures."""
    torch.set_num_threads(1)
    monkeypatch.setitem(DVAE_PRESETS, "tiny", DiscreteVAEConfig(16, 32, (8, 8, 16), blocks=1, codebook_dim=8))
    prior = PriorConfig(24, 300, (4, 4), 32, layers=2, heads=2, head_dim=16, conv_kernel=3)
    monkeypatch.setitem(PRIOR_PRESETS, "tiny", prior)


def run(capsys, *argv):
    capsys.readouterr()
    code = main(["demo", *argv])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(("data", "captions"), [(demo.SHAPES_DATA, demo.SHAPES), (demo.EMOJI_DATA, demo.EMOJI)])
def test_the_captions_are_those_of_training_pictures(data, captions):
    known = set(split(open_source(data, 32), "train").captions())
    assert len(captions) == len(set(captions)) == 8 and set(captions) <= known


@pytest.mark.slow
def test_the_demo_draws_and_goes_on(capsys, tmp_path, toy):
    command = ["--out", str(tmp_path / "demo"), "--minutes", "0.05", "--data", "shapes"]
    code, out, err = run(capsys, *command)
    assert code == 0
    for part in ("PSNR", "of 32 codes in use", "nats per text token", "per image token", "demo.png"):
        assert part in out
    for stage in ("1/3 dVAE", "2/3 pictures to codes", "3/3 prior"):
        assert stage in err
    picture = Image.open(tmp_path / "demo" / "demo.png")
    # The first row shows a large red circle at the center, as it is.
    side = demo.SCALE * 16
    column = [picture.getpixel((images.MARGIN + side // 2, y)) for y in range(picture.height // 8)]
    assert COLOURS["red"] in column
    assert picture.width == images.MARGIN + (2 + demo.CANDIDATES) * (side + images.MARGIN)

    (tmp_path / "demo" / "demo.png").unlink()
    code, again, _ = run(capsys, *command)  # nothing is left to train
    assert code == 0 and again.splitlines()[:2] == out.splitlines()[:2]
    assert Image.open(tmp_path / "demo" / "demo.png").tobytes() == picture.tobytes()


@pytest.mark.parametrize("without", ["font", "raqm"])
def test_without_emoji_the_demo_draws_shapes_and_says_so(capsys, monkeypatch, without):
    monkeypatch.setattr(emoji, "_ask_fontconfig", lambda: None)
    if without == "font":
        monkeypatch.setattr(emoji, "WELL_KNOWN_FONTS", ())
    else:
        monkeypatch.setattr(emoji.features, "check", lambda feature: False)
    data, captions = demo.choose_data(demo.DemoConfig())
    assert (data, captions) == (demo.SHAPES_DATA, demo.SHAPES)
    said = capsys.readouterr().err
    assert "shapes instead" in said and without in said and said.count("\n") == 1


def test_a_wrong_font_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"missing\.ttf"):
        demo.choose_data(demo.DemoConfig(font=str(tmp_path / "missing.ttf")))


def test_ctrl_c_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train_dvae", lambda config, on_step: Result(7, True, {}))
    code, out, err = run(capsys, "--out", str(tmp_path), "--data", "shapes")
    assert code == 130 and out == "" and "run the same command again" in err
