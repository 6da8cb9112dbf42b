"""Conversion of ruDALL-E's priors and tokenizer, and of a whole model."""

import dataclasses
import shutil

import pytest
import torch
from peers_for_tests import MERGES, RUDALLE, Rudalle, small_rudalle, write_rudalle, yttm_lines
from PIL import Image

from dalle import Pipeline, cli
from dalle.conversion.rudalle import read_rudalle
from dalle.conversion.yttm import read_yttm
from dalle.errors import UserError
from dalle.generation.sampler import generate_codes
from dalle.models.checkpoint import load_prior, save_part
from dalle.tokenizer import Tokenizer
from dalle.training.tokens import TokenizeConfig, tokenize
from dalle.training.train_dvae import TrainDVAEConfig, train_dvae
from dalle.training.train_prior import TrainPriorConfig, train_prior

ALPHABET = "▁абвг."
CAPTIONS = [[7, 8, 9], [4], [5, 6, 5, 6, 5, 6]]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small_rudalle(monkeypatch)


@pytest.fixture(params=[3, 2])
def peer(request):
    torch.manual_seed(request.param)
    return Rudalle(request.param)


@pytest.fixture
def path(peer, tmp_path):
    torch.save(peer.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


@pytest.fixture
def prior(path, tmp_path):
    save_part(tmp_path, "prior", read_rudalle(path))
    return load_prior(tmp_path)


def test_logits(peer, prior):
    """Text and image logits of whole sequences, and of the first codes."""
    prior, peer = prior.double(), peer.double()
    text = torch.zeros(3, 10, dtype=torch.int64)
    for row, ids in zip(text, CAPTIONS, strict=True):
        row[: len(ids) + 2] = torch.tensor([2, *ids, 3])
    codes = torch.randint(30, (3, 36), generator=torch.Generator().manual_seed(1))
    for n in (36, 35, 7, 1):
        expected = peer(text, codes[:, :n])
        text_logits, image_logits = prior(prior.pack_text(CAPTIONS), codes[:, :n])
        positions = prior.config.text_len - 1
        exact = dict(rtol=2e-6, atol=2e-6)  # our logits are float32
        torch.testing.assert_close(text_logits[..., :40], expected[:, :positions, :40].float(), **exact)
        image = expected[:, positions:, peer.vocab :].float()
        assert image.shape[1] in (image_logits.shape[1], image_logits.shape[1] + 1)
        torch.testing.assert_close(image_logits[:, : image.shape[1]], image[:, : image_logits.shape[1]], **exact)


def test_hidden_states_in_float64(peer, prior):
    """Up to the head, whose result is rounded to float32."""
    prior, peer = prior.double(), peer.double()
    codes = torch.randint(30, (1, 20), generator=torch.Generator().manual_seed(2))
    seen = []
    peer.to_logits[0].register_forward_hook(lambda *call: seen.append(call[2]))
    peer(torch.tensor([[2, 9, 9, 4, 3, 0, 0, 0, 0, 0]]), codes)
    hidden = prior.norm(prior._run(prior.pack_text([[9, 9, 4]]), codes))
    torch.testing.assert_close(hidden, seen[0], rtol=1e-12, atol=1e-12)


def test_generation_agrees_with_the_logits(prior):
    """Greedy codes through the decode cache are the most likely ones of the whole sequence."""
    text = prior.pack_text(CAPTIONS)
    codes = generate_codes(prior, text, top_k=1).flatten(1)
    with torch.no_grad():
        assert torch.equal(prior(text, codes)[1].argmax(-1), codes)


def test_loss_of_text_has_no_padding(prior):
    [targets] = prior.text_targets(prior.pack_text([[7, 8]])).tolist()
    assert [t for t in targets if t >= 0] == ([7, 8, 3] if prior.config.prefix == (2,) else [2, 7, 8, 3])
    loss = prior.loss(prior.pack_text(CAPTIONS), torch.zeros(3, 36, dtype=torch.int64))
    loss["loss"].backward()
    assert all(p.grad is not None for p in prior.parameters())


def test_too_long_captions(prior):
    with pytest.raises(UserError, match="reads at most 8"):
        prior.pack_text([[5] * 9])
    assert prior.pack_text([[5] * 9], truncate=True)[0, -1] == 3
    assert prior.pack_text([[5] * 8])[0].max() < 40


def refusal(read, path):
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_first_tensor_that_differs_is_named(peer, path):
    state, layer = peer.state_dict(), "transformer.layers.{}.mlp.dense_4h_to_h.bias"
    for change, message in (
        ({layer.format(2): torch.zeros(9)}, f"{layer.format(2)} is [9] there and [32] here"),
        ({"to_logits.1.bias": torch.zeros(9)}, "to_logits.1.bias is [9] there and [80] here"),
        ({"text_embeddings.weight": torch.zeros(9, 5)}, "text_embeddings.weight is [9, 5] there"),
        ({"text_embeddings.weight": torch.zeros(9, 32)}, "text_embeddings.weight is [9, 32] there and [50, 32] here"),
        ({layer.format(4): torch.zeros(9)}, f"{layer.format(4)} is [9] there and absent here"),
        ({"transformer.conv_mask": torch.ones(46, 46)}, "is of neither version 2 nor 3"),
        ({"image_embeddings.weight": torch.full((30, 32), torch.inf)}, "holds values that are not finite"),
    ):
        torch.save(state | change, path)
        assert message in refusal(read_rudalle, path)
    torch.save({"a": torch.zeros(1)}, path)
    assert "text_embeddings.weight is absent there" in refusal(read_rudalle, path)


# The tokenizer


def reference(text, ids):
    """BPE by the definition: the first merge of the list that applies, leftmost first, until none applies."""
    result = []
    for word in text.lower().split():
        tokens = []
        for c in "▁" + word:
            tokens += [c] if c in ids else ["<UNK>"] if not tokens or tokens[-1] != "<UNK>" else []
        for left, right in MERGES:
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == (left, right):
                    tokens[i : i + 2] = [left + right]
                i += 1
        result += [1 if token == "<UNK>" else ids[token] for token in tokens]
    return result


TEXTS = ("абвг", "Аб ВГ", "  вга  аб\tбабаб. ", "xyz аxб", "ё", "......", "аб.... в..", "вгвг▁аб", "абабвгвг xx xx x")


@pytest.fixture
def bpe(tmp_path):
    lines, ids = yttm_lines(ALPHABET)
    (tmp_path / "bpe.model").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "bpe.model", ids


def test_tokenizer(bpe, tmp_path):
    path, ids = bpe
    read_yttm(path).save(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size == 4 + len(ids)
    for text in TEXTS:
        expected = reference(text.replace("▁", " "), ids)
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.encode(text, dropout=1e-12, seed=1) == expected, text
    assert tokenizer.decode(tokenizer.encode("Аб  вг")) == "аб вг"
    assert len(tokenizer.encode("абвгабвг", dropout=1.0, seed=1)) == 9


def test_damaged_tokenizers(bpe):
    path, _ = bpe
    lines, _ = yttm_lines(ALPHABET)
    for changed, message in (
        (lines[:-1], "not a model of YouTokenToMe"),
        ([*lines[:3], "x y", *lines[4:]], "not a model of YouTokenToMe"),
        ([*lines[:-2], "99 5 15", lines[-1]], "not a model of YouTokenToMe"),
        ([*lines[:-1], "4 0 2 3"], "not a model of YouTokenToMe"),
        ([*lines[:-1], "-1 0 2 3"], "cannot be converted"),
        ([*lines[:-1], "99 0 2 3"], "cannot be converted"),
        (yttm_lines(ALPHABET, [*MERGES, ("а", "б")])[0], "is damaged"),
        (["1000000000 1"], "not a model of YouTokenToMe"),
    ):
        path.write_text("\n".join(changed), encoding="utf-8")
        assert message in refusal(read_yttm, path)


# The whole model


@pytest.fixture
def files(tmp_path):
    """The files of a model of version 2, which differs more."""
    write_rudalle(tmp_path / "files", Rudalle(2))
    return tmp_path / "files"


def test_command(files, tmp_path, capsys):
    out, grid = tmp_path / "out", tmp_path / "grid.png"
    assert cli.main(["convert", "rudalle", str(files), "--out", str(out)]) == 0, capsys.readouterr().err
    generate = ["--model", str(out), "--out", str(grid), "--candidates", "2", "--seed", "3"]
    assert cli.main(["generate", "абвг где", *generate]) == 0, capsys.readouterr().err
    Image.new("RGB", (40, 20), "red").save(tmp_path / "image.png")
    assert cli.main(["complete", str(tmp_path / "image.png"), "аб", "--rows", "3", *generate]) == 0
    assert cli.main(["reconstruct", str(tmp_path / "image.png"), "--model", str(out), "--out", str(grid)]) == 0
    assert cli.main(["info", str(out)]) == 0
    assert "class: VariantPrior" in capsys.readouterr().out
    assert cli.main(["export", "--model", str(out), "--out", str(tmp_path / "half")]) == 0
    Pipeline.from_pretrained(tmp_path / "half").generate("аб")


def test_prior_can_be_trained_further(files, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["convert", "rudalle", str(files), "--out", str(out)]) == 0
    new = tmp_path / "new"
    tokenize(TokenizeConfig(out=new, init=str(out), data="shapes-simple:12"))
    config = TrainPriorConfig(out=new, init=str(out), steps=2, batch_size=2, eval_every=0, threads=1)
    train_prior(config)
    assert load_prior(new).config == load_prior(out).config
    Pipeline.from_pretrained(new).generate("аб", seed=1)
    other = tmp_path / "other"
    tokenize(TokenizeConfig(out=other, init=str(out), data="shapes-simple:12", text_vocab=280))
    with pytest.raises(UserError, match="begins or ends with tokens of its own tokenizer"):
        train_prior(dataclasses.replace(config, out=other, new_tokenizer=True))
    with pytest.raises(UserError, match="is a VQGAN, which cannot be trained here"):
        train_dvae(TrainDVAEConfig(out=tmp_path / "dvae", init=str(out)))


def test_missing_and_ambiguous_files(files, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["convert", "rudalle", str(files), "--out", str(out)]
    shutil.copy(next(files.glob("*.bin")), files / "pytorch_model_other.bin")
    assert cli.main(arguments) == 2
    assert "must hold one file pytorch_model*.bin, not pytorch_model_other.bin, " in capsys.readouterr().err
    (files / "pytorch_model_other.bin").unlink()
    (files / "bpe.model").unlink()
    assert cli.main(arguments) == 2
    assert "must hold one file bpe.model, not none" in capsys.readouterr().err
    assert not list(out.glob("*.json"))


def test_other_vocabulary(files, tmp_path, bpe, capsys):
    shutil.copy(bpe[0], files / "bpe.model")
    assert cli.main(["convert", "rudalle", str(files), "--out", str(tmp_path / "out")]) == 2
    assert "reads 40 text tokens and the tokenizer has 16" in capsys.readouterr().err


def test_invalid_configurations():
    for change, message in (
        (dict(attention="dense"), "attention must be one of clip, torus, causal, not dense"),
        (dict(activation="relu"), "activation must be one of gelu, gelu-tanh, not relu"),
        (dict(prefix=(40,)), r"prefix must be of ids in \[0, 40\), not \(40,\)"),
        (dict(prefix=(2,) * 9), "leaves no room for a caption"),
        (dict(attention="torus", grid=(100, 100)), "may have at most 8192 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(RUDALLE, **change)
