"""The command line: every command end to end on a tiny model, and invalid input as one line and exit code 2."""

import io
import json
import math
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file

import dalle
from dalle import CLIP, CLIPConfig, DiscreteVAE, DiscreteVAEConfig, Pipeline, Prior, PriorConfig, images
from dalle.cli import COMMANDS, main
from dalle.cli.complete import read_mask
from dalle.cli.generation import labelled_grid
from dalle.cli.progress import duration, shown
from dalle.data import emoji
from dalle.models import hub as places
from dalle.runtime import Progress
from dalle.tokenizer import Tokenizer

DATA = "shapes-simple:60"
TINY = shlex.split(
    "--model.image-size 16 --model.vocab 32 --model.widths 8 8 16 --model.blocks 1 --model.codebook-dim 8"
)
TINY_PRIOR = shlex.split(
    "--model.layers 2 --model.heads 2 --model.head-dim 16 --model.conv-kernel 3 --model.text-vocab 300"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model directory of untrained parts."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("trained") / "model"
    tokenizer = Tokenizer.train(["a red circle", "a blue square"], 300)
    dvae = DiscreteVAE(DiscreteVAEConfig(16, 32, (8, 8, 16), blocks=1, codebook_dim=8, codebook_std=1.0))
    prior = Prior(PriorConfig(10, tokenizer.vocab_size, (4, 4), 32, layers=2, heads=2, head_dim=16, conv_kernel=3))
    size = CLIPConfig(16, 10, tokenizer.vocab_size, (8, 16), text_width=16, text_layers=1, text_heads=2)
    Pipeline(dvae, prior, tokenizer, CLIP(size)).save_pretrained(directory)
    return directory


@pytest.fixture
def here(tmp_path, monkeypatch, trained):
    """The working directory, with a model, an image and all kinds of invalid files."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "other", "truncated", "mixed", "half", "unranked"):
        shutil.copytree(trained, name)
    settings = json.loads(Path("other/dvae.json").read_text())
    Path("other/dvae.json").write_text(json.dumps(settings | {"vocab": 64}))
    weights = Path("truncated/dvae.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    settings = json.loads(Path("mixed/prior.json").read_text())
    Path("mixed/prior.json").write_text(json.dumps(settings | {"layers": "two"}))
    Path("half/prior.json").unlink()
    Path("unranked/clip.json").unlink()
    Path("nothing").mkdir()
    Path("running").mkdir()
    Path("running/prior.run.safetensors").touch()
    Path("file.txt").write_text("hello")
    Image.new("RGB", (20, 30), "red").save("image.png")
    Image.new("1", (20, 30), 0).save("black.png")
    broken_images(Path("broken"))
    return tmp_path


def broken_images(folder):
    """A folder with every kind of invalid image or caption."""
    folder.mkdir()
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    data = (folder / "whole.png").read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "zero.png").touch()
    (folder / "garbage.png").write_bytes(b"not an image")
    (folder / "huge.png").write_bytes(png_header(100_000, 100_000))
    (folder / "no-pixels.png").write_bytes(png_header(0, 5))
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("noise")
    Image.new("RGB", (8, 8)).save(folder / "silent.png")
    (folder / "lonely.txt").write_text("a caption without an image")


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def run(capsys, *argv):
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


# Valid commands


def test_from_images_to_images(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = ["--steps", "4", "--batch-size", "4", "--threads", "1", "--log-every", "2"]
    code, out, err = run(capsys, "train", "dvae", "--out", "m", "--data", DATA, *steps, *TINY)
    assert code == 0 and "4 steps, model in m; held-out images: nll" in out and "psnr" in err
    assert sorted(p.name for p in Path("m/samples").iterdir()) == ["dvae-0000004.png"]
    code, out, err = run(capsys, "tokenize", "--out", "m", "--data", DATA)
    assert code == 0 and "57 train, 3 heldout" in out
    code, out, err = run(capsys, "train", "prior", "--out", "m", *steps, *TINY_PRIOR)
    assert code == 0 and "4 steps, model in m; held-out images: loss" in out and "images/s" in err
    options = ["--model", "m", "--candidates", "3", "--seed", "7"]
    code, out, err = run(capsys, "generate", "a red circle", "a blue cross", *options)
    assert code == 0 and "96 image tokens" in err
    assert out == "a red circle: seeds 7, 8, 9\na blue cross: seeds 7, 8, 9\n6 images in grid.png\n"
    assert Image.open("grid.png").format == "PNG"
    code, out, err = run(capsys, "info", "m")
    assert code == 0 and "parameters" in out and "train: 57" in out and "grid: 4, 4" in out and "clip" not in out


def test_the_same_seed_gives_the_same_grid(capsys, here):
    command = ["generate", "a red circle", "--model", "model", "--candidates", "4"]
    for seed, out in ((3, "a.png"), (3, "b.png"), (4, "c.png")):
        assert run(capsys, *command, "--seed", str(seed), "--out", out)[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_the_best_are_shown_first_and_named(capsys, here, trained):
    command = ["generate", "a  red circle", "--model", "model", "--candidates", "5", "--top", "3", "--seed", "2"]
    code, out, _ = run(capsys, *command)
    assert code == 0
    results = Pipeline.from_pretrained(trained).generate("a red circle", candidates=5, seed=2)[0]
    best = sorted(results, key=lambda result: -result.score)[:3]
    seeds = ", ".join(f"{result.seed} ({result.score:.3f})" for result in best)
    assert out == f"a red circle: seeds {seeds}\n3 of 5 images in grid.png\n"
    assert Image.open("grid.png").tobytes() == labelled_grid([[d.image for d in best]], ["a red circle"]).tobytes()


def test_the_shipped_model_is_the_default(capsys, here, monkeypatch):
    monkeypatch.setattr(places, "SHIPPED", Path("model"))
    assert run(capsys, "generate", "a red circle", "--candidates", "1")[0] == 0
    assert run(capsys, "complete", "image.png", "a red circle", "--rows", "2", "--candidates", "1")[0] == 0
    assert run(capsys, "reconstruct", "image.png")[0] == 0


def test_complete_shows_the_image_what_is_kept_and_the_candidates(capsys, here, trained):
    fractal = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 50).convert("RGB")
    fractal.save("fractal.png")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 8, 32, 32))  # the last three rows of the last two columns of 4 x 4 codes
    mask.save("mask.png")
    command = ["complete", "fractal.png", "a red circle", "--model", "model", "--seed", "2", "--candidates", "3"]
    code, out, _ = run(capsys, *command, "--mask", "mask.png", "--top", "2", "--out", "masked.png")
    region = torch.zeros(4, 4, dtype=torch.bool)
    region[1:, 2:] = True
    assert code == 0 and torch.equal(read_mask(Path("mask.png"), 4), region)
    pipeline = Pipeline.from_pretrained(trained)
    small = images.square(fractal, 16)
    best = pipeline.complete(small, prompt="a red circle", mask=region, candidates=3, top=2, seed=2)
    assert out.splitlines()[0] == f"a red circle: seeds {', '.join(f'{d.seed} ({d.score:.3f})' for d in best)}"
    kept = pipeline.reconstruct(small)
    kept.paste((128, 128, 128), (8, 4, 16, 16))
    expected = labelled_grid([[small, kept, *(d.image for d in best)]], ["a red circle"])
    assert Image.open("masked.png").tobytes() == expected.tobytes()

    assert run(capsys, *command, "--rows", "2")[0] == 0
    best = pipeline.complete(small, prompt="a red circle", rows=2, candidates=3, seed=2)
    kept = pipeline.reconstruct(small)
    kept.paste((128, 128, 128), (0, 8, 16, 16))
    expected = labelled_grid([[small, kept, *(d.image for d in best)]], ["a red circle"])
    assert Image.open("grid.png").tobytes() == expected.tobytes()


def test_info_lists_every_part(capsys, here):
    code, out, _ = run(capsys, "info", "model", "--json")
    found = json.loads(out)
    assert code == 0 and sorted(found) == ["clip", "dvae", "prior"]
    clip = Pipeline.from_pretrained("model").clip
    assert found["clip"]["parameters"] == sum(p.numel() for p in clip.parameters())


def test_a_labelled_grid_shows_every_candidate_in_order():
    colours = ["red", "lime", "blue", "black", "yellow"]
    grid = labelled_grid([[Image.new("RGB", (16, 16), colour) for colour in colours]], ["a caption"])
    step = 128 + images.MARGIN
    tops = grid.height - 2 * step, grid.height - step
    shown = [grid.getpixel((images.MARGIN + 64 + column * step, top + 64)) for top in tops for column in range(3)]
    assert shown == [ImageColor.getrgb(colour) for colour in [*colours, "white"]]
    label = grid.crop((0, 0, grid.width, tops[0]))
    assert label.height > 10 and min(label.convert("L").tobytes()) < 50  # there is text in it


def test_reconstruct(capsys, here, trained):
    Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 50).convert("RGB").save("other image.png")
    paths = ["image.png", "other image.png"]
    code, out, err = run(capsys, "reconstruct", *paths, "--model", "model", "--out", "r.png")
    assert code == 0 and err == ""
    assert [line.split(":")[0] for line in out.splitlines()] == [*paths, "all"]
    dvae = Pipeline.from_pretrained(trained).dvae
    original = torch.stack([images.to_tensor(images.square(Image.open(path), 16)) for path in paths]) / 255
    error = (original - dvae.reconstruct(original)).square().mean().item()
    assert f"all: PSNR {-10 * math.log10(error):.2f} dB" in out
    red = Image.open("r.png").getpixel((images.MARGIN + 20, images.MARGIN + 20))
    assert red == (255, 0, 0)  # the original is above its reconstruction


def test_info_without_a_model_says_what_is_installed(capsys):
    code, out, _ = run(capsys, "info", "--json")
    found = json.loads(out)
    assert code == 0 and found["torch"] == torch.__version__ and "sparse_attention" in found["operations"]
    code, out, _ = run(capsys, "info")
    assert code == 0 and f"torch: {torch.__version__}" in out


def test_help_shows_every_command_and_every_default(capsys):
    code, out, _ = run(capsys)
    assert code == 0 and all(command in out for command in COMMANDS)
    for command in COMMANDS:
        code, out, _ = run(capsys, *command.split(), "--help")
        assert code == 0 and f"usage: dalle {command}" in out
    code, out, _ = run(capsys, "train", "dvae", "--preset", "small", "--help")
    text = " ".join(out.replace("\u2502", " ").split())
    assert "Images per step. (default: 32)" in text and "Side of the images in pixels. (default: 64)" in text


def test_names_with_control_characters_are_escaped(capsys, here):
    Path("data").mkdir()
    for i in range(20):
        Image.effect_noise((16, 16), 20 + i).save(f"data/{i:02}.png")
        Path(f"data/{i:02}.txt").write_text("noise")
    Path("data/\x1b[31mred\n.png").write_bytes(b"not an image")
    Path("data/\x1b[31mred\n.txt").write_text("noise")
    options = ("--steps", "1", "--batch-size", "4", *TINY)
    code, _, err = run(capsys, "train", "dvae", "--out", "m", "--data", "data", *options)
    assert code == 0 and "\x1b" not in err and r"  \x1b[31mred\n.png: " in err
    assert [line.split(": ")[0] for line in Path("m/skipped.txt").read_text().splitlines()] == [r"\x1b[31mred\n.png"]
    code, _, err = run(capsys, "reconstruct", "data/\x1b[31mred\n.png", "--model", "model")
    assert code == 2 and "\x1b" not in err and r"\x1b[31mred" in err


def test_training_skips_the_images_it_cannot_use(capsys, here):
    for i in range(20):
        Image.effect_noise((16, 16), 20 + i).save(f"broken/{i:02}.png")
        Path(f"broken/{i:02}.txt").write_text("noise")
    command = ["train", "dvae", "--out", "m", "--data", "broken", "--steps", "2", "--batch-size", "4", *TINY]
    code, _, err = run(capsys, *command)
    assert code == 0 and "7 files were skipped, all listed in m/skipped.txt" in err
    listed = dict(line.split(": ", 1) for line in Path("m/skipped.txt").read_text().splitlines())
    assert sorted(listed) == [
        "garbage.png", "huge.png", "lonely.txt", "no-pixels.png", "silent.png", "truncated.png", "zero.png"
    ]  # fmt: skip


def test_truncate_shortens_a_prompt(capsys, here):
    code, _, _ = run(capsys, "generate", "red " * 50, "--model", "model", "--truncate", "--candidates", "1")
    assert code == 0 and Path("grid.png").exists()


def test_export_rounds_prior_and_clip_and_leaves_the_model_alone(capsys, here, trained):
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    assert run(capsys, "export", "--model", str(trained), "--out", "small")[0] == 0
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before
    for part in ("dvae", "prior", "clip"):
        whole, stored = (load_file(folder / f"{part}.safetensors") for folder in (trained, Path("small")))
        expected = {name: t if part == "dvae" else t.half() for name, t in whole.items()}
        assert stored.keys() == expected.keys()
        assert all(t.dtype == expected[name].dtype and torch.equal(t, expected[name]) for name, t in stored.items())
    assert run(capsys, "generate", "a red circle", "--model", "small", "--candidates", "2", "--top", "1")[0] == 0


# Invalid input

GENERATE = ("generate", "a red circle", "--model", "model")
COMPLETE = ("complete", "image.png", "a red circle", "--model", "model")
TRAIN = ("train", "dvae", "--data", DATA, *TINY)
TRAIN_HERE = (*TRAIN, "--out", "m")

WRONG = [
    (("paint",), "'paint'"),
    (("train", "painter"), "'train painter'"),
    # Prompts
    (("generate", "--model", "model"), "no prompt"),
    (("generate", "", "--model", "model"), "''"),
    (("generate", " \t\n", "--model", "model"), "empty"),
    (("generate", "a \udcff", "--model", "model"), "not valid Unicode"),
    (("generate", "red " * 50, "--model", "model"), ("50 tokens", "at most 9", "--truncate")),
    # Sampling
    ((*GENERATE, "--candidates", "0"), ("candidates", "0")),
    ((*GENERATE, "--guidance", "-1"), ("guidance", "-1")),
    ((*GENERATE, "--guidance", "nan"), ("guidance", "nan")),
    ((*GENERATE, "--min-p", "0"), ("min_p", "(0, 1]", "0")),
    ((*GENERATE, "--negative", "blue"), "negative needs guidance"),
    ((*GENERATE, "--guidance", "2", "--negative", ""), "empty"),
    ((*GENERATE, "--candidates", "-3"), ("candidates", "-3")),
    ((*GENERATE, "--batch-size", "0"), ("batch_size", "0")),
    ((*GENERATE, "--candidates", "1000000000"), ("candidates", "at most 100,000", "1000000000")),
    ((*GENERATE, "--candidates", str(10**20)), ("candidates", "at most 100,000", str(10**20))),
    ((*GENERATE, "--batch-size", "1000000000"), ("batch_size", "at most 1,000,000")),
    ((*GENERATE, "--seed", "-1"), ("seed", "-1")),
    ((*GENERATE, "--temperature", "0"), ("temperature", "0")),
    ((*GENERATE, "--temperature", "nan"), ("temperature", "nan")),
    ((*GENERATE, "--top-k", "0"), ("top_k", "0")),
    ((*GENERATE, "--top-p", "1.5"), ("top_p", "1.5")),
    ((*GENERATE, "--device", "toaster"), "toaster"),
    ((*GENERATE, "--top", "0"), ("top", "0", "[1, 8]")),
    ((*GENERATE, "--candidates", "2", "--top", "3"), ("top", "3", "[1, 2]")),
    (("generate", "red", "--model", "unranked", "--top", "2"), ("no CLIP", "dalle train clip")),
    # Completing
    (COMPLETE, ("--rows", "--mask")),
    ((*COMPLETE, "--rows", "2", "--mask", "black.png"), ("--rows", "--mask")),
    ((*COMPLETE, "--rows", "0"), ("rows", "[1, 4)", "0")),
    ((*COMPLETE, "--rows", "4"), ("rows", "[1, 4)", "4")),
    ((*COMPLETE, "--rows", "-1"), ("rows", "[1, 4)", "-1")),
    ((*COMPLETE, "--mask", "black.png"), ("black.png", "bottom right")),
    ((*COMPLETE, "--mask", "missing.png"), "missing.png"),
    ((*COMPLETE, "--mask", "broken/truncated.png"), "broken/truncated.png"),
    ((*COMPLETE, "--mask", "nothing"), "nothing"),
    ((*COMPLETE, "--rows", "2", "--top", "9"), ("top", "9", "[1, 8]")),
    ((*COMPLETE, "--rows", "2", "--candidates", "0"), ("candidates", "0")),
    ((*COMPLETE, "--rows", "2", "--seed", "-1"), ("seed", "-1")),
    ((*COMPLETE, "--rows", "2", "--top-p", "1.5"), ("top_p", "1.5")),
    ((*COMPLETE, "--rows", "2", "--device", "toaster"), "toaster"),
    ((*COMPLETE, "--rows", "2", "--out", "missing/grid.png"), "missing/grid.png"),
    ((*COMPLETE, "--rows", "2", "--out", "folder.png"), ("folder.png", "directory")),
    ((*COMPLETE, "--rows", "2", "--out", "a" * 304 + ".png"), "File name too long"),
    (("complete", "image.png", "", "--rows", "2", "--model", "model"), "''"),
    (("complete", "image.png", "red " * 50, "--rows", "2", "--model", "model"), ("50 tokens", "--truncate")),
    (("complete", "missing.png", "red", "--rows", "2", "--model", "model"), "missing.png"),
    (("complete", "nothing", "red", "--rows", "2", "--model", "model"), "nothing"),
    *((("complete", f"broken/{name}.png", "red", "--rows", "2", "--model", "model"), f"broken/{name}.png")
      for name in ("truncated", "zero", "garbage", "huge", "no-pixels")),
    (("complete", "image.png", "red", "--rows", "2", "--model", "unranked", "--top", "2"), "dalle train clip"),
    (("complete", "image.png", "red", "--rows", "2", "--model", "truncated"), "truncated/dvae.safetensors"),
    # Output
    ((*GENERATE, "--out", "missing/grid.png"), "missing/grid.png"),
    ((*GENERATE, "--out", "file.txt/grid.png"), "file.txt/grid.png"),
    ((*GENERATE, "--out", "/proc/grid.png"), "/proc/grid.png"),
    ((*GENERATE, "--out", "nothing"), "nothing"),
    ((*GENERATE, "--out", "folder.png"), ("folder.png", "directory")),
    ((*GENERATE, "--out", "grid.jpeg"), ("grid.jpeg", ".png")),
    # Models
    (("generate", "red", "--model", "missing"), "missing"),
    (("generate", "red", "--model", "file.txt"), "file.txt"),
    (("generate", "red", "--model", "nothing"), ("nothing", "dvae.json")),
    (("generate", "red", "--model", "other"), ("other/dvae.safetensors", "another configuration")),
    (("generate", "red", "--model", "truncated"), ("truncated/dvae.safetensors", "damaged")),
    (("generate", "red", "--model", "mixed"), ("mixed/prior.json", "'two'")),
    (("generate", "red", "--model", "half"), ("half", "prior.json")),
    (("info", "missing"), "missing"),
    (("info", "file.txt"), "file.txt"),
    (("info", "nothing"), "nothing"),
    (("info", "truncated"), ("truncated/dvae.safetensors", "damaged")),
    # Images
    (("reconstruct", "--model", "model"), "no image"),
    (("reconstruct", "missing.png", "--model", "model"), "missing.png"),
    (("reconstruct", "nothing", "--model", "model"), "nothing"),
    *((("reconstruct", f"broken/{name}.png", "--model", "model"), f"broken/{name}.png")
      for name in ("truncated", "zero", "garbage", "huge", "no-pixels")),
    (("reconstruct", "image.png", "--model", "nothing"), ("nothing", "dvae.json")),
    (("reconstruct", "image.png", "--model", "model", "--out", "missing/r.png"), "missing/r.png"),
    # Data
    (("train", "dvae", "--out", "m", "--data", "missing"), "missing"),
    (("train", "dvae", "--out", "m", "--data", "nothing"), ("nothing", "no images")),
    (("train", "dvae", "--out", "m", "--data", "file.txt"), "file.txt"),
    (("train", "dvae", "--out", "m", "--data", "shapes:many"), "shapes:many"),
    (("train", "dvae", "--out", "m", "--data", f"shapes:{10**20 - 1}"), (f"shapes:{10**20 - 1}", "10,000,000")),
    (("train", "dvae", "--out", "m", "--data", f"shapes-simple:{'9' * 5000}"), "10,000,000"),
    (("train", "dvae", "--out", "m", "--font", "missing.ttf"), "missing.ttf"),
    (("train", "dvae", "--out", "m", "--font", "file.txt"), "file.txt"),
    (("tokenize", "--out", "nothing"), ("nothing", "dvae.json")),
    (("tokenize", "--out", "model", "--data", "missing"), "missing"),
    (("tokenize", "--out", "model", "--batch-size", "0"), ("batch_size", "0")),
    (("train", "prior", "--out", "nothing"), ("nothing", "dvae.json")),
    (("train", "prior", "--out", "model"), ("model", "dalle tokenize")),
    # Training
    ((*TRAIN_HERE, "--preset", "huge"), ("'huge'", "tiny")),
    ((*TRAIN_HERE, "--preset=huge"), "'huge'"),
    ((*TRAIN_HERE, "--steps", "-5"), ("steps", "-5")),
    ((*TRAIN_HERE, "--batch-size", "0"), ("batch_size", "0")),
    ((*TRAIN_HERE, "--minutes", "nan"), ("minutes", "nan")),
    ((*TRAIN_HERE, "--seed", "-1"), ("seed", "-1")),
    ((*TRAIN_HERE, "--lr", "nan"), ("lr", "nan")),
    ((*TRAIN_HERE, "--beta", "-2"), ("beta", "-2")),
    ((*TRAIN_HERE, "--beta-warmup", "1.5"), ("beta_warmup", "1.5")),
    ((*TRAIN_HERE, "--tau-end", "0"), ("tau_end", "0")),
    ((*TRAIN_HERE, "--tau-fall", "0"), ("tau_fall", "0")),
    ((*TRAIN_HERE, "--eval-every", "-1"), ("eval_every", "-1")),
    (("train", "prior", "--out", "m", "--lr", "-1"), ("lr", "-1")),
    (("train", "prior", "--out", "m", "--warmup", "-1"), ("warmup", "-1")),
    (("train", "prior", "--out", "m", "--ema-decay", "1"), ("ema_decay", "1")),
    (("train", "prior", "--out", "m", "--bpe-dropout", "2"), ("bpe_dropout", "2")),
    ((*TRAIN_HERE, "--batch-size", "1000000000"), ("batch_size", "at most 1,000,000")),
    ((*TRAIN_HERE, "--threads", "0"), ("threads", "0")),
    ((*TRAIN_HERE, "--threads", "100000"), ("threads", "at most 1,024", "100000")),
    (("evaluate", "--model", "model", "--out", "m", "--threads", "100000"), ("threads", "at most 1,024")),
    (("tokenize", "--out", "model", "--batch-size", "1000000000"), ("batch_size", "at most 1,000,000")),
    ((*TRAIN_HERE, "--device", "toaster"), "toaster"),
    ((*TRAIN_HERE, "--model.image-size", "18"), "18"),
    ((*TRAIN_HERE, "--model.widths", "7"), "7"),
    ((*TRAIN_HERE, "--model.codebook-std", "nan"), ("codebook_std", "nan")),
    ((*TRAIN, "--out", "file.txt"), "file.txt"),
    ((*TRAIN, "--out", "/proc/model"), "/proc/model"),
    ((*TRAIN_HERE, "--resume"), "m/dvae.run.safetensors"),
    (("train", "clip", "--out", "nothing"), ("nothing", "dvae.json")),
    (("train", "clip", "--out", "model", "--data", "missing"), "missing"),
    (("train", "clip", "--out", "model", "--batch-size", "1"), ("batch_size", "1", "at least 2")),
    (("train", "clip", "--out", "model", "--model.text-heads", "3"), ("text_heads", "3")),
    (("train", "decoder", "--out", "nothing"), ("nothing", "dvae.json")),
    (("train", "decoder", "--out", "model", "--data", DATA, "--widths", "8"), ("widths", "1")),
    (("train", "decoder", "--out", "model", "--data", DATA, "--resume"), "model/decoder.run.safetensors"),
    (("tokenize", "--out", "model", "--data", DATA, "--crops", "0"), ("crops", "0")),
    (("tokenize", "--out", "model", "--data", DATA, "--text-vocab", "99"), ("text_vocab", "99")),
    # Export
    (("export", "--model", "model", "--out", "./model"), ("model", "--out")),
    (("export", "--model", "missing", "--out", "m"), "missing"),
    (("export", "--model", "half", "--out", "m"), ("half", "prior.json")),
    (("export", "--model", "model", "--out", "file.txt"), "file.txt"),
    (("export", "--model", "model", "--out", "running"), "running/prior.run.safetensors"),
    (("demo", "--out", "file.txt"), "file.txt"),
    (("demo", "--out", "m", "--seed", "-1"), ("seed", "-1")),
]


@pytest.mark.parametrize(("argv", "named"), WRONG)
def test_invalid_input_is_one_line_and_exit_code_2(capsys, here, argv, named):
    Path("folder.png").mkdir()
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("dalle: ") and err.count("\n") == 1
    for part in (named,) if isinstance(named, str) else named:
        assert part in err
    assert not list(here.glob("**/*.tmp")) and not Path("grid.png").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ((*GENERATE, "--candidates", "many"), ("--candidates", "'many'")),
        ((*GENERATE, "--colour", "red"), ("--colour",)),
        ((*COMPLETE, "--rows", "many"), ("--rows", "'many'")),
        (("complete", "image.png", "--rows", "2"), ("PROMPT", "required")),
        (("train", "dvae", "--data", DATA), ("--out", "required")),
        (("train", "dvae"), ("--out", "required")),
        ((*TRAIN_HERE, "--precision", "float8"), ("--precision", "float8")),
    ],
)
def test_a_misspelt_option_exits_with_2_and_points_to_the_help(capsys, here, argv, named):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and "--help" in err and all(part in err for part in named)


def test_a_run_is_not_overwritten_nor_resumed_as_another(capsys, here):
    steps = ("--steps", "2", "--batch-size", "4")
    assert run(capsys, *TRAIN_HERE, *steps)[0] == 0
    code, _, err = run(capsys, *TRAIN_HERE, *steps)
    assert code == 2 and "m/dvae.run.safetensors" in err and "--resume" in err
    code, _, err = run(capsys, *TRAIN_HERE, *steps, "--resume", "--batch-size", "8")
    assert code == 2 and "batch_size" in err and "8" in err
    code, _, err = run(capsys, *TRAIN_HERE, *steps, "--resume", "--model.vocab", "64")
    assert code == 2 and "64" in err
    path = Path("m/dvae.run.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    code, _, err = run(capsys, *TRAIN_HERE, *steps, "--resume")
    assert code == 2 and "m/dvae.run.safetensors is damaged" in err and err.count("\n") == 1


def test_without_an_emoji_font_training_says_so(capsys, here, monkeypatch):
    monkeypatch.setattr(emoji, "_ask_fontconfig", lambda: None)
    monkeypatch.setattr(emoji, "WELL_KNOWN_FONTS", ())
    code, _, err = run(capsys, "train", "dvae", "--out", "m")
    assert code == 2 and "no colour-emoji font found" in err and err.count("\n") == 1


def test_without_raqm_training_on_emoji_says_so(capsys, here, monkeypatch):
    monkeypatch.setattr(emoji.features, "check", lambda feature: False)
    monkeypatch.setattr(emoji, "find_font", lambda path: path)
    code, _, err = run(capsys, "train", "dvae", "--out", "m")
    assert code == 2 and "lacks raqm" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["cuda", "junk"])
def test_a_backend_that_cannot_be_forced_is_one_line(name, here):
    environment = os.environ | {"DALLE_KERNELS_BACKEND": name, "PYTHONPATH": str(Path(dalle.__file__).parents[1])}
    command = [sys.executable, "-m", "dalle", *GENERATE, "--candidates", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert name in done.stderr and "unset DALLE_KERNELS_BACKEND" in done.stderr


def test_a_bug_shows_its_traceback():
    script = "import sys, dalle.cli.info as info; info._installation = lambda: 1 / 0; sys.exit(info_main(['info']))"
    script = script.replace("info_main", "__import__('dalle.cli').cli.main")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


# Ctrl-C and progress


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_resume(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--steps 1000000 --batch-size 4 --threads 1 --log-every 1 --eval-every 0 --save-every 1000000"
    command = ["train", "dvae", "--out", "my model", "--data", DATA, *options.split(), *TINY]
    environment = os.environ | {"PYTHONPATH": str(Path(dalle.__file__).parents[1])}
    process = [sys.executable, "-m", "dalle", *command]
    with subprocess.Popen(process, stderr=subprocess.PIPE, text=True, env=environment) as training:
        assert "step 1 " in training.stderr.readline()
        training.send_signal(signal.SIGINT)
        said = training.stderr.read()
    assert training.returncode == 130 and "Traceback" not in said
    again = shlex.split(said.splitlines()[-1])
    assert again == ["dalle", *command, "--resume"]
    stopped = int(said.split("stopped at step ")[1].split(";")[0])
    code, out, _ = run(capsys, *again[1:], "--steps", str(stopped + 3))
    assert code == 0 and f"{stopped + 3} steps, model in my model" in out


def test_ctrl_c_elsewhere_is_exit_code_130(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("dalle.cli.info._installation", interrupt)
    assert run(capsys, "info") == (130, "", "dalle: interrupted\n")


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    with shown("training") as on_step:
        for step in range(1, 101):
            on_step(Progress(step, step / 100, {"loss": 1.5}, 123.4, 65.0))
        on_step(Progress(100, 1.0, {"loss": 1.5}, 123.4, 0.0, {"psnr": 20.125, "codes used": 7}))
    assert capsys.readouterr().err.splitlines() == [
        "training:   1%  step 1  loss 1.500  123 images/s  1:05 left",
        "training: step 100, held-out images: psnr 20.125, codes used 7",
    ]


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with shown("training") as on_step:
        on_step(Progress(50, 0.5, {"loss": 1.5}, 123.4, 65.0))
    assert "50%" in terminal.getvalue() and "step 50  loss 1.500  123 images/s  1:05 left" in terminal.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (math.inf, "?")])
def test_duration(seconds, text):
    assert duration(seconds) == text
