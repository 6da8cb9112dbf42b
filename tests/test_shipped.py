"""The shipped model: complete, small enough, and its images match their prompts."""

import json
from pathlib import Path

import pytest
import torch

from dalle import Pipeline, images
from dalle.models.checkpoint import fingerprint
from dalle.models.hub import SHIPPED

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "benchmarks/results/shipped-model/evaluation.json"


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_pretrained()


def test_it_is_complete_and_small(pipeline):
    assert pipeline.clip is not None and pipeline.dvae.config.image_size >= 64
    assert all(parameter.dtype == torch.float32 for parameter in pipeline.prior.parameters())
    weights = list(SHIPPED.glob("*.safetensors"))
    assert len(weights) == 3 and sum(path.stat().st_size for path in weights) <= 24e6


def ink(image):
    """Mean colour of the pixels that are not white, in [0, 255], and their fraction of the image."""
    pixels = images.to_tensor(image).float()
    inked = pixels.min(0).values < 200
    return pixels[:, inked].mean(1), inked.float().mean().item()


@pytest.mark.parametrize(("prompt", "strongest"), [("red heart", 0), ("green heart", 1), ("blue heart", 2)])
def test_colours_are_as_asked(pipeline, prompt, strongest):
    [[best, *_]] = pipeline.generate(prompt, candidates=8, top=1, seed=0)
    colour, area = ink(best.image)
    assert colour.argmax().item() == strongest and 0.2 < area < 0.9


def test_clip_ranks_the_matching_image_first(pipeline):
    """Among images for six prompts, each prompt scores its own image highest."""
    prompts = ["red heart", "green apple", "penguin", "pizza", "woman dark skin tone", "rocket"]
    results = pipeline.generate(prompts, candidates=8, top=1, seed=1)
    best = [row[0].image for row in results]
    scores = torch.stack([pipeline.score(best, prompt) for prompt in prompts])
    assert scores.argmax(1).tolist() == list(range(len(prompts)))


def test_the_evaluation_is_of_this_model(pipeline):
    """The committed figures name the weights they were measured with."""
    measured = json.loads(REPORT.read_text())["conditions"]["fingerprints"]
    assert measured == {name: fingerprint(getattr(pipeline, name)) for name in ("dvae", "prior", "clip")}
