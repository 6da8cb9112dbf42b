"""Conversion of minDALL-E's prior and tokenizer, and of the whole model."""

import json

import pytest
import torch
from peers_for_tests import Mindalle, Taming
from tokenizers.implementations import CharBPETokenizer

from dalle import cli
from dalle.conversion.mindalle import read_mindalle, read_tokenizer
from dalle.errors import UserError
from dalle.generation.sampler import generate_codes
from dalle.models import variant, vqgan
from dalle.models.checkpoint import load_prior, save_part
from dalle.models.variant import VariantPriorConfig
from dalle.tokenizer import Tokenizer

CONFIG = VariantPriorConfig(
    7, 40, (4, 4), 30, layers=2, heads=2, head_dim=16, attention="causal", activation="gelu", sandwich=False,
    raster_positions=True, prefix=(), suffix=(),
)  # fmt: skip
CAPTIONS = [[7, 8, 9], [4], [5, 6, 5, 6, 5, 6, 5]]
PADDING = 2


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(variant.PRESETS, "mindalle", CONFIG)
    monkeypatch.setitem(vqgan.PRESETS, "mindalle", vqgan.VQGANConfig(8, 30, (32, 64), codebook_dim=16))


@pytest.fixture
def peer():
    torch.manual_seed(8)
    return Mindalle()


@pytest.fixture
def path(peer, tmp_path):
    torch.save({"state_dict": peer.state_dict(), "epoch": 1}, tmp_path / "stage2_last.ckpt")
    return tmp_path / "stage2_last.ckpt"


@pytest.fixture
def prior(path, tmp_path):
    save_part(tmp_path, "prior", read_mindalle(path, PADDING))
    return load_prior(tmp_path)


def padded():
    return torch.tensor([ids + [PADDING] * (7 - len(ids)) for ids in CAPTIONS])


def test_logits(peer, prior):
    prior, peer = prior.double(), peer.double()
    codes = torch.randint(30, (3, 16), generator=torch.Generator().manual_seed(1))
    exact = dict(rtol=2e-6, atol=2e-6)  # our logits are float32
    for n in (16, 5, 1):
        text, image = peer(padded(), codes[:, :n])
        text_logits, image_logits = prior(prior.pack_text(CAPTIONS), codes[:, :n])
        torch.testing.assert_close(text_logits[..., :40], text[:, :6].float(), **exact)
        torch.testing.assert_close(text_logits[..., 40], text[:, :6, PADDING].float(), **exact)
        torch.testing.assert_close(image_logits, image[:, 6 : 6 + image_logits.shape[1]].float(), **exact)


def test_hidden_states_in_float64(peer, prior):
    prior, peer, seen = prior.double(), peer.double(), []
    codes = torch.randint(30, (3, 16), generator=torch.Generator().manual_seed(2))
    peer.ln_f.register_forward_hook(lambda *call: seen.append(call[2]))
    peer(padded(), codes)
    hidden = prior.norm(prior._run(prior.pack_text(CAPTIONS), codes))
    torch.testing.assert_close(hidden, seen[0], rtol=1e-12, atol=1e-12)


def test_generation_agrees_with_the_logits(prior):
    text = prior.pack_text(CAPTIONS)
    codes = generate_codes(prior, text, top_k=1).flatten(1)
    with torch.no_grad():
        assert torch.equal(prior(text, codes)[1].argmax(-1), codes)


def test_text_ends_with_padding(prior):
    assert prior.text_targets(prior.pack_text([[7, 8]])).tolist() == [[8, 40, -100, -100, -100, -100]]


def test_first_tensor_that_differs_is_named(peer, path):
    state = peer.state_dict()
    for change, message in (
        ({"blocks.1.attn.key.bias": torch.zeros(5)}, "blocks.1.attn.key.bias is [5] there and [32] here"),
        ({"blocks.1.mlp.2.weight": torch.zeros(5)}, "blocks.1.mlp.2.weight is [5] there and [32, 128] here"),
        ({"head_img.bias": torch.zeros(5)}, "head_img.bias is [5] there and absent here"),
        ({"tok_emb_txt.weight": torch.zeros(41, 32)}, "tok_emb_txt.weight is [41, 32] there and [40, 32] here"),
    ):
        torch.save({"state_dict": state | change}, path)
        with pytest.raises(UserError) as error:
            read_mindalle(path, PADDING)
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def files(tmp_path, path, peer):
    """The unpacked archive, with a tokenizer of 40 tokens."""
    characters = [c + end for c in "abcdeg." for end in ("", "</w>")]
    merges = [("a", "b"), ("ab", "c</w>"), ("c", "d"), ("e", "g</w>"), (".", ".</w>")]
    tokens = ["[UNK]", "[X]", "[PAD]", *characters, *(a + b for a, b in merges)]
    tokens += [f"[{i}]" for i in range(40 - len(tokens))]
    (tmp_path / "tokenizer").mkdir()
    vocab, rules = (tmp_path / "tokenizer" / f"bpe-16k-{name}" for name in ("vocab.json", "merges.txt"))
    vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    rules.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    torch.save({"state_dict": Taming(False, 30, (32, 64), 16).state_dict()}, tmp_path / "stage1_last.ckpt")
    return tmp_path


def test_tokenizer(files, tmp_path):
    paths = [files / "tokenizer" / f"bpe-16k-{name}" for name in ("vocab.json", "merges.txt")]
    peer = CharBPETokenizer.from_file(*map(str, paths), unk_token="[UNK]", lowercase=True)
    converted, padding = read_tokenizer(*paths)
    assert padding == PADDING
    converted.save(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    for text in ("abc", "ABC, abcab eg.", "zz abz", "ab..", "a  cd\tcd", "é日a"):
        assert tokenizer.encode(text) == tokenizer.encode(text, dropout=1e-12, seed=1) == peer.encode(text).ids, text
    assert tokenizer.decode(tokenizer.encode("abc eg")) == "abc eg"
    for path, content in zip(paths, ("{}", "a b c"), strict=True):
        good = path.read_text()
        path.write_text(content)
        with pytest.raises(UserError, match="are no tokenizer of minDALL-E"):
            read_tokenizer(*paths)
        path.write_text(good)


def test_command(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["convert", "mindalle", str(files), "--out", str(out)]) == 0, capsys.readouterr().err
    assert cli.main(["generate", "abc eg", "--model", str(out), "--out", str(tmp_path / "grid.png")]) == 0
    again = ["convert", "mindalle", str(files / "tokenizer"), "--out", str(tmp_path / "again")]
    assert cli.main(again) == 2
    assert "bpe-16k-vocab.json does not exist" in capsys.readouterr().err
