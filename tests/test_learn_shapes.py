"""The recipe for synthetic shapes, on a tiny model."""

import json

import learn_shapes
import pytest

from dalle import DiscreteVAEConfig, PriorConfig, UserError
from dalle.models.clip import PRESETS as CLIP_PRESETS
from dalle.models.clip import CLIPConfig


@pytest.mark.slow
def test_the_whole_on_a_toy_model(tmp_path, monkeypatch):
    dvae = DiscreteVAEConfig(32, 32, (8, 8, 16), blocks=1, codebook_dim=8)
    prior = PriorConfig(24, 300, (8, 8), 32, layers=2, heads=4, head_dim=16, conv_kernel=3)
    clip = CLIPConfig(32, 24, 300, (8, 16), text_width=16, text_layers=1, text_heads=2)
    monkeypatch.setitem(learn_shapes.DVAE_SETTINGS, "model", dvae)
    monkeypatch.setitem(learn_shapes.PRIOR_SETTINGS, "model", prior)
    monkeypatch.setitem(CLIP_PRESETS, "tiny", clip)
    monkeypatch.setattr(learn_shapes, "DATA", "shapes-simple:400")
    assert learn_shapes.main(minutes=0.06, out=tmp_path, captions=12, ranked=4, seed=5, threads=1) == 0

    report = json.loads((tmp_path / "learn_shapes.json").read_text())
    for part in ("training", "held-out"):
        found = report["shapes"][part]
        assert all(entry["proportion"] == 1 and entry["total"] == 12 for entry in found["real images"].values())
        generated = found["best of 16 by CLIP"]
        assert generated["joint"]["correct"] <= min(entry["correct"] for entry in generated.values())
        assert report["candidates"][part]["joint"]["candidates"] == [1, 2, 4]
        assert 1 <= report["dvae"][part]["codes in use"] <= 32
    page = (tmp_path / "learn_shapes.md").read_text()
    assert "min (" in page and "real images" in page

    minutes = report["training"]["minutes"]
    again = learn_shapes.train(minutes, tmp_path, 5, 1)  # the training is complete
    assert again["steps"] == report["training"]["steps"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(minutes=0), "minutes must be positive"),
        (dict(dvae_share=0.9, clip_share=0.1), "leave time for the prior"),
        (dict(captions=0), "captions must be at least 1"),
    ],
)
def test_mistakes(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        learn_shapes.main(out=tmp_path, **options)
