"""The pipeline: saving and loading, generation that depends only on prompt and seed, ranking, completion."""

import inspect
import json
import shutil
from dataclasses import fields, replace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

import dalle_kernels as dk
from dalle import CLIP, CLIPConfig, DiscreteVAE, DiscreteVAEConfig, Pipeline, Prior, PriorConfig, UserError
from dalle.generation import pipeline as pipelines
from dalle.generation.sampler import sequence_bytes
from dalle.models import hub as places
from dalle.runtime import free_memory
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


@pytest.fixture(scope="module")
def ranking(pipeline):
    """The pipeline with a CLIP."""
    torch.manual_seed(1)
    size = CLIPConfig(16, 10, pipeline.tokenizer.vocab_size, (8, 16), text_width=16, text_layers=1, text_heads=2)
    clip = CLIP(size)
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Pipeline(pipeline.dvae, pipeline.prior, pipeline.tokenizer, clip)


@pytest.fixture
def directory(ranking, tmp_path):
    ranking.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def image():
    return Image.effect_mandelbrot((30, 20), (-2, -1, 1, 1), 50).convert("RGB")


def codes(results):
    return torch.stack([result.codes for row in results for result in row])


# Saving and loading

PARTS = ["dvae.json", "dvae.safetensors", "prior.json", "prior.safetensors", "tokenizer.json"]
CLIP_PARTS = ["clip.json", "clip.safetensors"]


def test_a_saved_model_generates_the_same(ranking, directory):
    assert sorted(p.name for p in directory.iterdir()) == ["README.md", *CLIP_PARTS, *PARTS]
    loaded = Pipeline.from_pretrained(directory)
    assert loaded.dvae.config == ranking.dvae.config and loaded.prior.config == ranking.prior.config
    first, second = (p.generate(CAPTIONS, candidates=2, seed=5) for p in (ranking, loaded))
    assert torch.equal(codes(first), codes(second))
    assert first[1][1].image.tobytes() == second[1][1].image.tobytes()
    assert [d.score for row in first for d in row] == [d.score for row in second for d in row]


def test_a_model_without_a_clip_leaves_none_behind(pipeline, directory):
    (directory / "README.md").write_text("mine")
    pipeline.save_pretrained(directory)
    assert sorted(p.name for p in directory.iterdir()) == ["README.md", *PARTS]
    assert (directory / "README.md").read_text() == "mine"
    assert Pipeline.from_pretrained(directory).clip is None


def test_saving_that_fails_leaves_the_earlier_model(pipeline, directory, monkeypatch):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("dalle.files.save_file", fail)
    with pytest.raises(UserError, match=r"no space left.*the previous file is intact"):
        pipeline.save_pretrained(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    with pytest.raises(UserError, match="not a directory that can be written to"):
        pipeline.save_pretrained(directory / "dvae.json")


@pytest.mark.filterwarnings("ignore:.*of an earlier version")
def test_the_shipped_model(directory, monkeypatch):
    """Its weights are stored in float16 and loaded as float32."""
    for path in directory.glob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    monkeypatch.setattr(places, "SHIPPED", directory)
    loaded = Pipeline.from_pretrained()
    stored = load_file(directory / "prior.safetensors")
    assert all(torch.equal(p, stored[name].float()) for name, p in loaded.prior.state_dict().items())
    assert loaded.generate("a red circle", candidates=2, top=1)[0][0].score is not None


def test_an_installation_without_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(UserError, match=r"this installation has no shipped model .*prior.json is missing"):
        Pipeline.from_pretrained()


def test_a_model_from_the_hub(directory, monkeypatch):
    asked = {}

    def download(model, allow_patterns, **how):
        asked.update(how, model=model, allow_patterns=allow_patterns)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Pipeline.from_pretrained("someone/emoji", revision="v1").clip is not None
    assert asked["model"] == "someone/emoji" and asked["revision"] == "v1"
    assert all(any(huggingface_hub.utils.filter_repo_objects([name], allow_patterns=asked["allow_patterns"]))
               for name in PARTS + CLIP_PARTS)  # fmt: skip


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("cannot be reached\nat all"), OSError("cannot be reached")])
def test_a_hub_that_cannot_be_reached(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"someone/emoji is not a directory, and .* \(cannot be reached\)"):
        Pipeline.from_pretrained("someone/emoji")


def test_pushing_uploads_what_saving_writes(ranking, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / "uploaded")

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    ranking.push_to_hub("someone/emoji")
    uploaded = tmp_path / "uploaded"
    assert sorted(path.name for path in uploaded.iterdir()) == ["README.md", *CLIP_PARTS, *PARTS]
    assert "library_name: dalle-kernels" in (uploaded / "README.md").read_text()
    generated = Pipeline.from_pretrained(uploaded).generate("a red circle", seed=1)
    assert torch.equal(codes(generated), codes(ranking.generate("a red circle", seed=1)))


# Generation


def test_what_a_generated_image_is(pipeline):
    rows = pipeline.generate(CAPTIONS[:2], candidates=3, seed=7)
    assert [[d.prompt for d in row] for row in rows] == [[CAPTIONS[0]] * 3, [CAPTIONS[1]] * 3]
    assert [d.seed for d in rows[1]] == [7, 8, 9] and rows[1][0].score is None
    result = rows[0][2]
    assert result.image.size == (16, 16) and result.image.mode == "RGB" and result.codes.shape == (4, 4)
    expected = (pipeline.dvae.decode(result.codes[None])[0] * 255).round().to(torch.uint8)
    assert result.image.tobytes() == expected.permute(1, 2, 0).contiguous().numpy().tobytes()


def test_a_seed_reproduces_its_image(pipeline):
    row = pipeline.generate("a red circle", candidates=4, seed=20)[0]
    again = pipeline.generate("a red circle", seed=row[3].seed)[0][0]
    assert torch.equal(again.codes, row[3].codes)


@pytest.mark.parametrize("batch_size", [1, 2, 4, None])
def test_a_seed_for_every_prompt_gives_what_separate_calls_give(ranking, batch_size):
    seeds = [40, 3, 41]
    rows = ranking.generate(CAPTIONS, candidates=3, top=2, seed=seeds, top_k=8, batch_size=batch_size)
    for caption, seed, row in zip(CAPTIONS, seeds, rows, strict=True):
        [alone] = ranking.generate(caption, candidates=3, top=2, seed=seed, top_k=8)
        assert [d.seed for d in row] == [d.seed for d in alone] and {d.seed for d in row} < {seed, seed + 1, seed + 2}
        assert torch.equal(codes([row]), codes([alone]))


def test_the_signatures_list_the_options():
    """With the names and defaults of the dataclass that checks them."""
    expected = {field.name: field.default for field in fields(pipelines.GenerationOptions)} | {"seed": None}
    for method, own in ((Pipeline.generate, {"prompts"}), (Pipeline.complete, {"image", "prompt", "rows", "mask"})):
        parameters = dict(list(inspect.signature(method).parameters.items())[1:])
        assert {name: p.default for name, p in parameters.items() if name not in own} == expected


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, None])
def test_the_batch_size_changes_nothing(pipeline, batch_size):
    expected = pipeline.generate(CAPTIONS, candidates=3, seed=1, top_k=8, batch_size=9)
    found = pipeline.generate(CAPTIONS, candidates=3, seed=1, top_k=8, batch_size=batch_size)
    assert torch.equal(codes(found), codes(expected))
    assert [[d.seed for d in row] for row in found] == [[1, 2, 3]] * 3


@pytest.mark.parametrize(("room", "passes"), [(10**6, [512, 88]), (600, [300, 300]), (0, [1] * 600)])
def test_batches_fit_into_half_of_the_free_memory(pipeline, monkeypatch, room, passes):
    free = room * sequence_bytes(pipeline.prior, 600)
    monkeypatch.setattr(pipelines, "free_memory", lambda device: free)
    generated = []

    def generate(prior, rows, *, candidates, **_):
        generated.append(candidates)
        return torch.zeros(candidates, 4, 4, dtype=torch.int64)

    monkeypatch.setattr(pipelines, "generate_codes", generate)
    assert len(pipeline.generate("red", candidates=600)[0]) == 600
    assert generated == passes


def test_guidance_takes_twice_the_memory_and_keeps_the_seeds(pipeline, monkeypatch):
    monkeypatch.setattr(pipelines, "free_memory", lambda device: 8 * sequence_bytes(pipeline.prior, 3))
    calls, generate = [], pipelines.generate_codes

    def counted(*arguments, **options):
        calls.append(options["candidates"])
        return generate(*arguments, **options)

    monkeypatch.setattr(pipelines, "generate_codes", counted)
    options = dict(candidates=3, seed=1, guidance=1e3)  # as an untrained model hardly depends on the text
    found = pipeline.generate(CAPTIONS, negative="a blue square", **options)
    assert calls == [2, 1] * len(CAPTIONS)  # two images fit, four without guidance
    expected = pipeline.generate(CAPTIONS, negative="a blue square", batch_size=9, **options)
    assert torch.equal(codes(found), codes(expected))
    assert not torch.equal(codes(found), codes(pipeline.generate(CAPTIONS, **options)))


def test_free_memory():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**60


def test_without_a_seed_images_differ(pipeline):
    assert not torch.equal(codes(pipeline.generate(CAPTIONS)), codes(pipeline.generate(CAPTIONS)))


# Ranking


def test_the_best_come_first(ranking, pipeline):
    rows, plain = (p.generate(CAPTIONS, candidates=6, seed=4) for p in (ranking, pipeline))
    for row, in_order in zip(rows, plain, strict=True):
        assert sorted(d.seed for d in row) == [d.seed for d in in_order] == list(range(4, 10))
        for result in row:  # one by one, from the returned image
            text = ranking.clip.encode_text(ranking.clip.pack_text([ranking.tokenizer.encode(result.prompt)]))
            seen = ranking.clip.encode_images(pipeline._square(result.image))
            cosine = torch.nn.functional.cosine_similarity(seen.double(), text.double()).item()
            assert result.score == pytest.approx(cosine, abs=1e-5)
            assert torch.equal(result.codes, in_order[result.seed - 4].codes)
        scores = [d.score for d in row]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1


def test_top_keeps_the_best(ranking, monkeypatch):
    everything = ranking.generate(CAPTIONS, candidates=6, seed=4)
    monkeypatch.setattr(pipelines, "MAX_BATCH_PIXELS", 4 * 16**2)  # decoded and scored in batches of four and two
    best = ranking.generate(CAPTIONS, candidates=6, top=2, seed=4)
    assert [[d.seed for d in row] for row in best] == [[d.seed for d in row[:2]] for row in everything]
    assert all(len(row) == 2 for row in best)


def test_scores_of_images_of_any_size(ranking, image):
    small = ranking._square(image)
    found = ranking.score([image, image.rotate(180)], CAPTIONS[0])
    assert found.shape == (2,) and found.dtype == torch.float32 and found.abs().max() <= 1
    assert found[0].item() == pytest.approx(ranking.score(small / 255, CAPTIONS[0]).item(), abs=1e-5)
    assert found[0] != found[1]


def test_ranking_needs_a_clip(pipeline, image):
    with pytest.raises(UserError, match=r"no CLIP.*dalle train clip"):
        pipeline.generate("red", candidates=3, top=2)
    with pytest.raises(UserError, match=r"no CLIP.*dalle train clip"):
        pipeline.score([image], "red")
    assert len(pipeline.generate("red", candidates=3, top=3)[0]) == 3


# Completing


def test_completion_keeps_the_upper_rows(pipeline, image):
    kept = pipeline.dvae.codes(pipeline._square(image))[0, :3]
    results = pipeline.complete(image, prompt=CAPTIONS[0], rows=3, candidates=2, seed=3)
    assert [d.seed for d in results] == [3, 4]
    assert all(torch.equal(d.codes[:3], kept) for d in results)


def test_completion_regenerates_what_the_mask_marks(ranking, image):
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:, 2:] = True
    given = ranking.codes(image)
    results = ranking.complete(image, prompt=CAPTIONS[0], mask=mask, candidates=8, top=5, seed=3, batch_size=3)
    assert len(results) == 5 and results[0].score == max(d.score for d in results)
    assert all(torch.equal(d.codes[~mask], given[~mask]) for d in results)
    assert len({tuple(d.codes[mask].tolist()) for d in results}) > 1
    by_codes = ranking.complete(given, prompt=CAPTIONS[0], mask=mask, candidates=8, top=5, seed=3)
    assert torch.equal(codes([results]), codes([by_codes]))


def test_completing_from_rows_is_completing_with_their_mask(pipeline, image):
    mask = torch.arange(4)[:, None].expand(4, 4) >= 2
    generated = [pipeline.complete(image, prompt="red", seed=3, **part) for part in (dict(rows=2), dict(mask=mask))]
    assert torch.equal(codes(generated[:1]), codes(generated[1:]))


# Reconstructing


def test_reconstruction(pipeline):
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    expected = (pipeline.dvae.reconstruct(image[None])[0] * 255).round().to(torch.uint8)
    found = pipeline.reconstruct(Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert found.tobytes() == expected.permute(1, 2, 0).contiguous().numpy().tobytes()


def test_transparent_images_are_composited_on_white(pipeline):
    clear = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    assert pipeline.reconstruct(clear).tobytes() == pipeline.reconstruct(Image.new("RGB", (9, 9), "white")).tobytes()


def test_grey_images_of_16_bits_are_scaled_not_clipped(pipeline):
    grey = torch.randint(256, (9, 9), dtype=torch.uint8).numpy()
    wide = Image.fromarray(grey.astype("uint16") * 257)
    assert wide.mode == "I;16"
    assert pipeline.reconstruct(wide).tobytes() == pipeline.reconstruct(Image.fromarray(grey)).tobytes()


# Invalid input


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(prompts="", seed=1), "is empty"),
        (dict(prompts="red " * 40), "tokens and the model reads at most 9: shorten it"),
        (dict(prompts="red", candidates=0), "must be at least 1, not 0"),
        (dict(prompts="red", temperature=0.0), "temperature must be a positive"),
        (dict(prompts="red", top_p=1.5), "top_p must lie in"),
        (dict(prompts="red", top_k=0), "top_k must be an int of at least 1"),
        (dict(prompts="red", batch_size=0), "batch_size must be at least 1, not 0"),
        (dict(prompts="red", seed=-1), r"seed must be in \[0, 2\^62\), not -1"),
        (dict(prompts=["red", "blue"], seed=[1]), "there are 1 seeds for 2 prompts: give one for each"),
        (dict(prompts=["red", "blue"], seed=[1, -2]), r"seed must be in \[0, 2\^62\), not -2"),
        (dict(prompts="red", candidates=2, top=3), r"top must be in \[1, 2\], the candidates, not 3"),
        (dict(prompts="red", candidates=2, top=0), r"top must be in \[1, 2\], the candidates, not 0"),
        (dict(prompts=[b"red"]), "a prompt must be a string, not b'red'"),
        (dict(prompts=None), "prompts must be a string or a sequence of strings, not None"),
        (dict(prompts="red", candidates="3"), "candidates must be a whole number, not '3'"),
        (dict(prompts="red", candidates=True), "candidates must be a whole number, not True"),
        (dict(prompts="red", candidates=10**9), "candidates must be at most 100,000, not 1000000000"),
        (dict(prompts="red", candidates=np.int64(10**9)), "candidates must be at most 100,000, not 1000000000"),
        (dict(prompts="red", top=1.0), "top must be a whole number or None, not 1.0"),
        (dict(prompts="red", temperature="hot"), "temperature must be a number, not 'hot'"),
        (dict(prompts="red", truncate=1), "truncate must be True or False, not 1"),
        (dict(prompts="red", batch_size=2.5), "batch_size must be a whole number or None, not 2.5"),
        (dict(prompts="red", seed=1.5), "seed must be a whole number, not 1.5"),
        (dict(prompts="red", seed="7"), "seed must be a whole number, not '7'"),
        (dict(prompts=[]), "there is no prompt"),
    ],
)
def test_bad_requests(pipeline, arguments, reason):
    with pytest.raises(UserError, match=reason):
        pipeline.generate(**arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(rows=0), r"rows, the rows of codes to keep, must be in \[1, 4\), not 0"),
        (dict(rows=4), r"must be in \[1, 4\), not 4"),
        (dict(rows=1.5), "rows must be a whole number, not 1.5"),
        (dict(rows=2, prompt=None), "a prompt must be a string, not None"),
        (dict(rows=2, image=torch.full((3, 16, 16), torch.nan)), "image as a tensor must be finite.* NaN"),
        (dict(rows=2, image=torch.zeros(3, 16, 16, dtype=torch.int32)), "must be uint8 or float .*, not torch.int32"),
        (dict(rows=2, image="red.png"), "an image must be a Pillow image or a tensor, not str"),
        (dict(), "give either rows or mask"),
        (dict(rows=2, mask=torch.ones(4, 4, dtype=torch.bool)), "give either rows or mask"),
        (dict(mask=torch.ones(4, 5, dtype=torch.bool)), r"bool \[4, 4\], not bool \[4, 5\]"),
        (dict(mask=torch.eye(4)), r"bool \[4, 4\], not float32"),
        (dict(mask=torch.zeros(4, 4, dtype=torch.bool)), "nothing to generate"),
        (dict(mask=torch.eye(4).bool().logical_not()), "must reach the bottom right"),
        (dict(rows=2, image=torch.zeros(3, 8, 8)), r"must be \[3, 16, 16\], not \[3, 8, 8\]"),
        (dict(rows=2, image=torch.zeros(3, 3, dtype=torch.int64)), r"int64 \[1, 4, 4\], not int64 \[1, 3, 3\]"),
        (dict(rows=2, image=torch.full((4, 4), 32)), r"must be in \[0, 32\)"),
        (dict(rows=2, candidates=1, top=2), "top must be in"),
        (dict(rows=2, prompt=""), "is empty"),
    ],
)
def test_bad_completions(pipeline, image, arguments, reason):
    with pytest.raises(UserError, match=reason):
        pipeline.complete(**dict(image=image, prompt="red") | arguments)


def test_bad_images_to_score(ranking, image):
    for images, reason in (
        (torch.full((1, 3, 16, 16), torch.inf), "finite"),
        ([image, "red.png"], "Pillow image or a tensor, not str"),
    ):
        with pytest.raises(UserError, match=reason):
            ranking.score(images, "red")
    with pytest.raises(UserError, match="a prompt must be a string, not 3"):
        ranking.score([image], 3)


def test_numbers_of_numpy_are_numbers(pipeline):
    options = dict(candidates=np.int64(2), temperature=np.float32(1), seed=np.int64(3), batch_size=np.int64(2))
    theirs, ours = pipeline.generate("red", **options), pipeline.generate("red", candidates=2, seed=3)
    assert torch.equal(codes(theirs), codes(ours))


def test_unknown_arguments_of_loading(directory):
    with pytest.raises(TypeError, match="from_pretrained has no argument 'foo'; it has device, revision"):
        Pipeline.from_pretrained(directory, foo=1)
    with pytest.raises(UserError, match="device must be one that this PyTorch can use; got 'toaster'"):
        Pipeline.from_pretrained(directory, device="toaster")


def test_a_long_prompt_can_be_truncated(ranking):
    assert len(ranking.generate("red " * 40, truncate=True)[0]) == 1


def test_not_a_model(tmp_path):
    with pytest.raises(UserError, match=r"has no dvae.json, so it holds no dvae: give the directory"):
        Pipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        Pipeline.from_pretrained(tmp_path / "file")


@pytest.mark.parametrize("name", ["prior.json", "prior.safetensors", "tokenizer.json", "clip.safetensors"])
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
        (dict(wings=2), "unknown fields for a PriorConfig: wings"),
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


def test_parts_that_do_not_match(pipeline, ranking):
    other = DiscreteVAE(DiscreteVAEConfig(16, 31, (8, 8, 16), blocks=1))
    with pytest.raises(UserError, match="not parts of one model"):
        Pipeline(other, pipeline.prior, pipeline.tokenizer)
    with pytest.raises(UserError, match="not parts of one model"):
        Pipeline(pipeline.dvae, pipeline.prior, Tokenizer.train(CAPTIONS, 256))
    for change in (dict(text_vocab=7), dict(image_size=32)):
        clip = CLIP(replace(ranking.clip.config, **change))
        with pytest.raises(UserError, match="not parts of one model"):
            Pipeline(pipeline.dvae, pipeline.prior, pipeline.tokenizer, clip)


def test_options_are_checked_whatever_backend_is_forced():
    """The check needs no GPU, and so no backend of one."""
    with dk.use_backend("cuda"):
        pipelines.GenerationOptions(candidates=2, top_k=5)
        with pytest.raises(UserError, match="top_k"):
            pipelines.GenerationOptions(top_k=0)
