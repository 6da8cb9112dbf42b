"""The pipeline: a model directory out and in again, and drawing that depends on prompt and seed alone."""

import json

import pytest
import torch
from PIL import Image

from dalle import DiscreteVAE, DiscreteVAEConfig, Pipeline, Prior, PriorConfig, UserError
from dalle.tokenizer import Tokenizer

CAPTIONS = ["a red circle", "a blue square", "a green circle above a red square"]


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    dvae = DiscreteVAE(DiscreteVAEConfig(16, 32, (8, 8, 16), blocks=1, codebook_dim=8, codebook_std=1.0))
    size = PriorConfig(10, tokenizer.vocab_size, (4, 4), 32, layers=2, heads=2, head_dim=16, conv_kernel=3)
    prior = Prior(size)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Pipeline(dvae, prior, tokenizer)


@pytest.fixture
def directory(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def codes(drawings):
    return torch.stack([drawing.codes for row in drawings for drawing in row])


def test_a_saved_model_draws_the_same(pipeline, directory):
    assert sorted(p.name for p in directory.iterdir()) == [
        "dvae.json", "dvae.safetensors", "prior.json", "prior.safetensors", "tokenizer.json"
    ]  # fmt: skip
    loaded = Pipeline.from_pretrained(directory)
    assert loaded.dvae.config == pipeline.dvae.config and loaded.prior.config == pipeline.prior.config
    first, second = (p.generate(CAPTIONS, candidates=2, seed=5) for p in (pipeline, loaded))
    assert torch.equal(codes(first), codes(second))
    assert first[1][1].image.tobytes() == second[1][1].image.tobytes()


def test_what_a_drawing_is(pipeline):
    rows = pipeline.generate(CAPTIONS[:2], candidates=3, seed=7)
    assert [[d.prompt for d in row] for row in rows] == [[CAPTIONS[0]] * 3, [CAPTIONS[1]] * 3]
    assert [d.seed for d in rows[1]] == [7, 8, 9]
    drawing = rows[0][2]
    assert drawing.image.size == (16, 16) and drawing.image.mode == "RGB" and drawing.codes.shape == (4, 4)
    expected = (pipeline.dvae.decode(drawing.codes[None])[0] * 255).round().to(torch.uint8)
    assert drawing.image.tobytes() == expected.permute(1, 2, 0).contiguous().numpy().tobytes()


def test_a_seed_draws_its_picture_again(pipeline):
    row = pipeline.generate("a red circle", candidates=4, seed=20)[0]
    again = pipeline.generate("a red circle", seed=row[3].seed)[0][0]
    assert torch.equal(again.codes, row[3].codes)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7])
def test_the_batch_size_changes_nothing(pipeline, batch_size):
    expected = pipeline.generate(CAPTIONS, candidates=3, seed=1, top_k=8)
    found = pipeline.generate(CAPTIONS, candidates=3, seed=1, top_k=8, batch_size=batch_size)
    assert torch.equal(codes(found), codes(expected))
    assert [[d.seed for d in row] for row in found] == [[1, 2, 3]] * 3


def test_without_a_seed_pictures_differ(pipeline):
    assert not torch.equal(codes(pipeline.generate(CAPTIONS)), codes(pipeline.generate(CAPTIONS)))


def test_completion_keeps_the_upper_rows(pipeline):
    picture = Image.effect_mandelbrot((30, 20), (-2, -1, 1, 1), 50).convert("RGB")
    kept = pipeline.dvae.codes(pipeline._square(picture))[0, :3]
    drawings = pipeline.generate(CAPTIONS, candidates=2, complete=picture, keep_rows=3, seed=3)
    assert all(torch.equal(c[:3], kept) for c in codes(drawings))


def test_reconstruction(pipeline):
    picture = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    expected = (pipeline.dvae.reconstruct(picture[None])[0] * 255).round().to(torch.uint8)
    found = pipeline.reconstruct(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    assert found.tobytes() == expected.permute(1, 2, 0).contiguous().numpy().tobytes()


def test_transparent_pictures_lie_on_white(pipeline):
    clear = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    assert pipeline.reconstruct(clear).tobytes() == pipeline.reconstruct(Image.new("RGB", (9, 9), "white")).tobytes()


def test_grey_pictures_of_16_bits_are_scaled_not_clipped(pipeline):
    grey = torch.randint(256, (9, 9), dtype=torch.uint8).numpy()
    wide = Image.fromarray(grey.astype("uint16") * 257)
    assert wide.mode == "I;16"
    assert pipeline.reconstruct(wide).tobytes() == pipeline.reconstruct(Image.fromarray(grey)).tobytes()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(prompts="", seed=1), "is empty"),
        (dict(prompts="red " * 40), "tokens and the model reads at most 9: shorten it"),
        (dict(prompts="red", candidates=0), "must be at least 1, not 0"),
        (dict(prompts="red", temperature=0.0), "temperature must be a positive"),
        (dict(prompts="red", top_p=1.5), "top_p must lie in"),
        (dict(prompts="red", top_k=0), "top_k must be an int of at least 1"),
        (dict(prompts="red", keep_rows=2), "no picture to complete"),
        (dict(prompts="red", complete=Image.new("RGB", (4, 4)), keep_rows=4), r"keep_rows must be in \[0, 4\)"),
        (dict(prompts=[b"red"]), "must be a string"),
    ],
)
def test_bad_requests(pipeline, arguments, reason):
    with pytest.raises(UserError, match=reason):
        pipeline.generate(**arguments)


def test_a_long_prompt_can_be_cut(pipeline):
    assert len(pipeline.generate("red " * 40, truncate=True)[0]) == 1


def test_not_a_model(tmp_path):
    with pytest.raises(UserError, match=r"has no dvae.json, so it holds no dvae: name the directory"):
        Pipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        Pipeline.from_pretrained(tmp_path / "file")


@pytest.mark.parametrize("name", ["prior.json", "prior.safetensors", "tokenizer.json", "dvae.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
def test_damaged_files(directory, name, damage):
    path = directory / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": path.read_bytes()[:-20], "garbage": b"\x00\xff" * 50}[damage])
    with pytest.raises(UserError, match=name):
        Pipeline.from_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(wings=2), "fields that a PriorConfig does not know: wings"),
        (dict(layers="two"), "'two' should be of type int"),
        (dict(layers=3), r"belongs to another configuration: layers.2"),
        (dict(grid=4), "should be a list"),
        (dict(heads=True), "should be of type int"),
    ],
)
def test_edited_configurations(directory, change, reason):
    path = directory / "prior.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=reason):
        Pipeline.from_pretrained(directory)


def test_parts_that_do_not_fit(pipeline):
    other = DiscreteVAE(DiscreteVAEConfig(16, 31, (8, 8, 16), blocks=1))
    with pytest.raises(UserError, match="not parts of one model"):
        Pipeline(other, pipeline.prior, pipeline.tokenizer)
    with pytest.raises(UserError, match="not parts of one model"):
        Pipeline(pipeline.dvae, pipeline.prior, Tokenizer.train(CAPTIONS, 256))
