"""Damage to files: a file loads with exactly the content that was written, or is refused in one sentence."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from dalle import Pipeline, UserError
from dalle.files import read_tensors
from dalle.models.checkpoint import load_clip, load_dvae, load_parts, load_prior
from dalle.models.tokens import load_tokens
from dalle.training import checkpoint
from faults.models_for_tests import run_dvae

FLIPS = 12  # damaged copies of each file, half of them within the first bytes, where a header is
HEADER = 400
PAGE = 4096


class File(NamedTuple):
    """A file of a model directory, and what is read from it."""

    name: str
    content: Callable[[Path], Any]


def weights_of(load):
    def content(directory):
        model = load(directory)
        return model.config, model.state_dict()

    return content


def tokenizer_of(directory):
    return load_parts(directory).tokenizer._bpe.to_str()


def tokens_of(directory):
    parts = load_tokens(directory, load_dvae(directory))
    return [(part.codes, part.captions, part.keys) for part in parts.values()]


def checkpoint_of(stage):
    def content(directory):
        path = directory / f"{stage}.run.safetensors"
        tensors, metadata = read_tensors(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # they are mapped from the file
        return tensors, checkpoint._header(metadata, path)

    return content


FILES = [
    *(File(f"{part}.{suffix}", weights_of(load))
      for part, load in (("dvae", load_dvae), ("prior", load_prior), ("clip", load_clip))
      for suffix in ("json", "safetensors")),
    File("tokenizer.json", tokenizer_of),
    File("codes.safetensors", tokens_of),
    File("captions.json", tokens_of),
    *(File(f"{stage}.run.safetensors", checkpoint_of(stage)) for stage in ("dvae", "prior", "clip")),
]  # fmt: skip


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def loads_the_same(file, directory, expected):
    """False if the file is refused; fails if it loads with another content, or raises anything but a UserError."""
    try:
        assert equal(file.content(directory), expected), "damage was not noticed"
    except UserError as error:
        assert len(str(error)) < 1000
        return False
    return True


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_flipped_bits(model, file, seed):
    path, rng, refused = model / file.name, random.Random(seed), 0
    good, expected = path.read_bytes(), file.content(model)
    for i in range(FLIPS):
        damaged = bytearray(good)
        damaged[rng.randrange(len(good) if i % 2 else min(HEADER, len(good)))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        refused += not loads_the_same(file, model, expected)
    assert refused > FLIPS // 2


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_zeroed_and_missing_bytes(model, file, seed):
    path, rng = model / file.name, random.Random(seed)
    good, expected = path.read_bytes(), file.content(model)
    start = rng.randrange(len(good))
    zeroed = good[:start] + bytes(min(PAGE, len(good) - start)) + good[start + PAGE :]
    for damaged in (zeroed, bytes(len(good)), b"", good[:start], good + b"\0", good[:8], b"\xff" * 8 + good[8:]):
        path.write_bytes(damaged)
        assert damaged == good or not loads_the_same(file, model, expected)


def test_damaged_weights_of_a_checkpoint_stop_the_resume(model):
    path = model / "dvae.run.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"dvae\.run\.safetensors is damaged"):
        run_dvae(model, resume=True, steps=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["dvae", "prior", "clip"])
def test_weights_that_are_not_finite(model, part, value):
    """In a file without a digest, as earlier versions wrote."""
    path = model / f"{part}.safetensors"
    tensors = load_file(path)
    tensors[sorted(tensors)[0]].view(-1)[0] = value
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"{part}\.safetensors is damaged: .* not finite"):
        Pipeline.from_pretrained(model)


def test_a_digest_cannot_be_lost(model):
    path = model / "dvae.safetensors"
    path.write_bytes(path.read_bytes().replace(b"digest", b"digits", 1))
    with pytest.raises(UserError, match=r"dvae\.safetensors is damaged .*its digest is missing"):
        load_dvae(model)


@pytest.mark.filterwarnings("ignore:.*by an earlier version")
def test_files_without_a_digest_load(model):
    """As earlier versions wrote them, with weights in float32 or, exported, in float16."""
    expected = [model.state_dict() for model in (load_dvae(model), load_prior(model))]
    for name in ("dvae", "prior"):
        path = model / f"{name}.safetensors"
        save_file(load_file(path), path)
    loaded = Pipeline.from_pretrained(model)
    assert equal(expected, [loaded.dvae.state_dict(), loaded.prior.state_dict()])
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    assert equal({name: tensor.half().float() for name, tensor in expected[1].items()}, load_prior(model).state_dict())
