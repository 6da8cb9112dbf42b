"""Files made to deceive: they are refused in one sentence before anything of a size that they choose is built."""

import contextlib
import json
import os
import resource
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers_for_tests import Rudalle, small_rudalle, write_rudalle
from safetensors.torch import load_file, save_file

from dalle import Pipeline, UserError
from dalle.conversion.convert import convert
from dalle.files import digest, read_tensors, write_tensors, write_text
from dalle.models.checkpoint import load_clip, load_dvae, load_prior
from dalle.models.tokens import load_tokens
from dalle.tokenizer import ALPHABET, Tokenizer
from faults.models_for_tests import run_dvae, run_prior

MEMORY = 1 << 30  # that loading a tiny model may take
PARTS = {"dvae": load_dvae, "prior": load_prior, "clip": load_clip}
SIZES = [0, -1, 1, 3, 1000, 10**6, 10**9, 2**31, 10**12, 2**63, 10**30, 10**400]
json_values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(SIZES) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def bounded_memory():
    """Allocations beyond MEMORY fail, and with them the test."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def places(value, at=()):
    """The paths of all values in a JSON document."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def replaced(document, at, value):
    """A copy of a JSON document with another value in one place."""
    if not at:
        return value
    copy = document.copy()
    copy[at[0]] = replaced(copy[at[0]], at[1:], value)
    return copy


def forget_configuration(path, to):
    """Copies weights without the digest of their configuration, as whoever changes it on purpose can."""
    save_file(load_file(path), to)


hostile = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("name", PARTS)
@hostile
@given(data=st.data())
def test_changed_configurations(built, tmp_path_factory, bounded_memory, name, data):
    load_changed(built, name, data, tmp_path_factory.mktemp("changed"))


def load_changed(built, name, data, directory):
    forget_configuration(built / f"{name}.safetensors", directory / f"{name}.safetensors")
    good = json.loads((built / f"{name}.json").read_text())
    changed = replaced(good, data.draw(st.sampled_from(list(places(good)))), data.draw(json_values))
    (directory / f"{name}.json").write_text(json.dumps(changed))
    with contextlib.suppress(UserError):  # or a model, if the change is in a field that no shape depends on
        PARTS[name](directory)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A model of ruDALL-E, version 2."""
    directory = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        small_rudalle(patch)
        write_rudalle(directory / "files", Rudalle(2))
        convert("rudalle", directory / "files", directory / "model")
    return directory / "model"


@pytest.mark.parametrize("name", ["dvae", "prior"])
@hostile
@given(data=st.data())
def test_changed_configurations_of_converted_models(converted, tmp_path_factory, bounded_memory, name, data):
    load_changed(converted, name, data, tmp_path_factory.mktemp("changed"))


@pytest.mark.parametrize("named", ["Prior", "VariantPrior", "VQGAN", "CLIP", "os.system", "", 3, ["VQGAN"], None])
def test_classes_that_a_part_cannot_have(model, named):
    path = model / "dvae.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class": named}))
    with pytest.raises(UserError, match=r"dvae\.json"):
        load_dvae(model)


@hostile
@given(data=st.data())
def test_changed_tokenizers(built, tmp_path_factory, bounded_memory, data):
    path = tmp_path_factory.mktemp("changed") / "tokenizer.json"
    good = json.loads((built / "tokenizer.json").read_text())
    where = st.sampled_from([at for at in places(good) if at[:2] not in {("model", "vocab"), ("model", "merges")}])
    inside = st.sampled_from([at for at in places(good) if len(at) == 3])
    path.write_text(json.dumps(replaced(good, data.draw(where | inside), data.draw(json_values))))
    try:
        tokenizer = Tokenizer.load(path)
    except UserError:
        return
    assert tokenizer.decode(tokenizer.encode("A red circle")) == "a red circle"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("prior", {"layers": 10**9}),
        ("prior", {"heads": 10**6}),
        ("prior", {"image_vocab": 10**12}),
        ("dvae", {"blocks": 10**9}),
        ("dvae", {"decoder_blocks": 10**9}),
        ("dvae", {"image_size": 2**30}),
        ("clip", {"text_layers": 10**9}),
        ("clip", {"embedding_dim": 2**30}),
    ],
)
def test_sizes_that_the_weights_do_not_have(model, bounded_memory, name, change):
    path, weights = (model / f"{name}.{suffix}" for suffix in ("json", "safetensors"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    forget_configuration(weights, weights)
    began = time.process_time()
    with pytest.raises(UserError, match=rf"{name}\.(json|safetensors)"):
        Pipeline.from_pretrained(model)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["dvae.json", "tokenizer.json", "captions.json"])
def test_text_of_a_size_that_makes_no_sense(model, name):
    os.truncate(model / name, 6 << 30)  # takes no space
    with pytest.raises(UserError, match=rf"{name} is damaged: it has 6,442,450,944 bytes"):
        load_tokens(model, load_dvae(model))


def test_comparing_shapes_draws_no_noise(model, monkeypatch):
    """On the meta device, which would import torch._dynamo for it, in two seconds."""
    drawn, draw = [], torch.nn.init._no_grad_normal_

    def record(tensor, *arguments, **options):
        drawn.append(tensor.is_meta)
        return draw(tensor, *arguments, **options)

    monkeypatch.setattr(torch.nn.init, "_no_grad_normal_", record)
    for load in PARTS.values():
        load(model)
    assert drawn and not any(drawn)


@pytest.mark.parametrize("name", ["prior.json", "tokenizer.json", "captions.json"])
@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "9" * 10_000, "[]", "null", '{"layers": NaN}', "\ud800"]
)
def test_text_that_is_not_the_expected_json(model, name, text):
    (model / name).write_text(text, errors="surrogatepass")
    with pytest.raises(UserError, match=name):
        load_tokens(model, Pipeline.from_pretrained(model).dvae)


def test_a_large_tokenizer_loads_at_once(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    pairs = [[a, b] for a in ALPHABET for b in ALPHABET][:20_000]
    vocab = {token: i for i, token in enumerate([*ALPHABET, *("".join(pair) for pair in pairs)])}
    tokenizer["model"] |= {"vocab": vocab, "merges": pairs}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    began = time.process_time()
    assert Tokenizer.load(model / "tokenizer.json").vocab_size == 20_256
    assert time.process_time() - began < 1.5


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("normalizer", "normalizers"), [{"type": "Prepend", "prepend": "a" * 1000}]),
        (("pre_tokenizer", "use_regex"), False),
        (("decoder",), None),
        (("model", "byte_fallback"), True),
        (("model", "vocab", "a"), 299),
        (("model", "vocab", "a"), 10**6),
    ],
)
def test_tokenizers_of_another_kind(model, path, value):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(replaced(tokenizer, path, value)))
    with pytest.raises(UserError, match=r"another kind of tokenizer|not a tokenizer file"):
        Tokenizer.load(model / "tokenizer.json")


def tensor(name, value):
    return lambda tensors, header: tensors.update({name: value})


def without(*names):
    return lambda tensors, header: [mapping.pop(name, None) for name in names for mapping in (tensors, header)]


def says(**change):
    return lambda tensors, header: header.update({name: json.dumps(value) for name, value in change.items()})


SLOT = "optimizer.0.exp_avg"
LIES = {
    "a slot of one element": tensor(SLOT, torch.zeros(1)),
    "a slot of another dtype": lambda tensors, header: tensors.update({SLOT: tensors[SLOT].double()}),
    "a slot of NaN": lambda tensors, header: tensors[SLOT].fill_(torch.nan),
    "a slot that is missing": without(SLOT),
    "a slot too many": tensor("optimizer.0.more", torch.zeros(1)),
    "a step of several elements": tensor("optimizer.0.step", torch.zeros(3)),
    "an index beyond the parameters": tensor("optimizer.999.step", torch.zeros(())),
    "an index that is none": tensor("optimizer.x.step", torch.zeros(())),
    "an index without a slot": tensor("optimizer.0", torch.zeros(())),
    "weights of another dtype": lambda tensors, header: tensors.update(
        {"model.encoder.input.bias": tensors["model.encoder.input.bias"].to(torch.int32)}
    ),
    "weights of NaN": lambda tensors, header: tensors["model.encoder.input.bias"].fill_(torch.nan),
    "no step": without("step"),
    "no identity": without("identity"),
    "no time": without("elapsed"),
    "no format": without("format"),
    "a step in words": says(step="two"),
    "a negative step": says(step=-5),
    "half a step": says(step=20.5),
    "a step of true": says(step=True),
    "a step that was not done": says(step=10**18),
    "an identity that is a list": says(identity=[1]),
    "a time that is infinite": says(elapsed=float("inf")),
    "a header that is not JSON": lambda tensors, header: header.update(step="{"),
    "a header nested deep": lambda tensors, header: header.update(identity="[" * 100_000),
}


@pytest.mark.parametrize("lie", LIES)
def test_checkpoints_that_lie(model, lie):
    """With a digest that matches, as whoever changes a file on purpose can write it."""
    path = model / "dvae.run.safetensors"
    tensors, header = read_tensors(path)
    LIES[lie](tensors, header)
    write_tensors(path, tensors, header)
    with pytest.raises(UserError, match=r"dvae\.run\.safetensors (is damaged|is not|belongs to another)"):
        run_dvae(model, resume=True, steps=3)


@pytest.mark.parametrize("code", [-1, 32, 2000])
def test_codes_outside_the_vocabulary(model, code):
    codes, metadata = read_tensors(model / "codes.safetensors")
    codes["train"][3, 1, 1] = code
    write_tensors(model / "codes.safetensors", codes, metadata)
    with pytest.raises(UserError, match=r"codes\.safetensors and captions\.json are damaged.*tokenize"):
        run_prior(model, resume=True, steps=3)


@pytest.mark.parametrize("captions", [None, {}, {"train": {"captions": [], "keys": []}}, {"train": 1, "heldout": 2}])
def test_captions_of_another_form(model, captions):
    text = json.dumps(captions)
    write_text(model / "captions.json", text)
    codes, metadata = read_tensors(model / "codes.safetensors")
    write_tensors(model / "codes.safetensors", codes, metadata | {"captions": digest(text)})
    with pytest.raises(UserError, match=r"captions\.json are damaged.*tokenize"):
        load_tokens(model, load_dvae(model))


@pytest.mark.parametrize(
    "name", ["dvae.run.safetensors", "dvae.safetensors", "dvae.json", "tokenizer.json", "codes.safetensors"]
)
def test_a_pipe_is_not_waited_for(model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(UserError, match=rf"{name} is not a regular file"):
        run_dvae(model, resume=True, steps=3) if ".run." in name else run_prior(model, resume=True, steps=3)
