"""Byte-level BPE: any text round-trips, training is deterministic, dropout is seeded and does not leak."""

import json
import os
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle.data import open_source
from dalle.errors import UserError
from dalle.tokenizer import ALPHABET, MAX_WORD, Tokenizer, _merge

TRAIN = """
import sys
from dalle.tokenizer import Tokenizer
print(Tokenizer.train(sys.stdin, 400)._bpe.to_str())
"""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(open_source("shapes:2000", 32).captions(), 400)


words = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text.strip())


def normalised(text):
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


@given(text=st.text(st.characters(exclude_categories=["Cs", "Zs", "Zl", "Zp", "Cc"]), min_size=1))
def test_any_text_encodes_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids and all(0 <= i < tokenizer.vocab_size for i in ids)
    back = tokenizer.decode(ids)
    assert tokenizer.encode(back) == ids or normalised(back) != back  # lower-casing can undo itself only once
    if text.isascii():
        assert back == text.lower()


@given(text=words, dropout=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
def test_dropout_changes_the_pieces_but_not_the_text(tokenizer, text, dropout, seed):
    ids = tokenizer.encode(text, dropout=dropout, seed=seed)
    assert ids == tokenizer.encode(text, dropout=dropout, seed=seed)
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text))
    assert len(ids) >= len(tokenizer.encode(text))


@given(text=words)
def test_merging_without_dropout_agrees_with_the_library(tokenizer, text):
    pieces = tokenizer._bpe.pre_tokenizer.pre_tokenize_str(tokenizer._bpe.normalizer.normalize_str(text))
    merged = [token for word, _ in pieces for token in _merge(word, tokenizer._ranks, 0.0, lambda: 1.0)]
    assert [tokenizer._bpe.token_to_id(token) for token in merged] == tokenizer.encode(text)


def test_known_text(tokenizer):
    ids = tokenizer.encode("a small red circle at the top left")
    assert [tokenizer.decode([i]) for i in ids] == ["a", "small", "red", "circle", "at", "the", "top", "left"]
    assert tokenizer.encode("  A Small\tRED circle\nat the TOP left ") == ids
    assert tokenizer.decode(tokenizer.encode("É\u0301TÉ ☕ 日本")) == "é\u0301té ☕ 日本"
    assert len(tokenizer.encode("☕")) > 1  # bytes, for the captions have none


def test_dropout_gives_many_segmentations_and_does_not_leak(tokenizer):
    text = "three purple triangles"
    before = tokenizer.encode(text)
    segmentations = {tuple(tokenizer.encode(text, dropout=0.3, seed=seed)) for seed in range(200)}
    assert len(segmentations) > 20 and len({tuple(tokenizer.encode(text, dropout=0.3)) for _ in range(50)}) > 5
    assert tokenizer.encode(text, dropout=1.0) == [tokenizer._bpe.token_to_id(c) for c in "ĠthreeĠpurpleĠtriangles"]
    assert tokenizer.encode(text) == before == tokenizer.encode(text, dropout=0.0, seed=3)
    assert '"dropout":null' in tokenizer._bpe.to_str().replace(" ", "")


def test_dropout_skips_a_merge_with_its_probability():
    tokenizer = Tokenizer.train(["ab"] * 10, len(ALPHABET) + 1)  # one merge only: Ġa or ab
    text, trials = "ab", 4_000
    whole = len(tokenizer.encode(text))
    kept = sum(len(tokenizer.encode(text, dropout=0.1, seed=seed)) == whole for seed in range(trials))
    assert abs(kept / trials - 0.9) < 5 * (0.9 * 0.1 / trials) ** 0.5


def test_long_words_are_cut_only_for_dropout(tokenizer):
    text = "circle" * 5_000
    ids = tokenizer.encode(text, dropout=0.1, seed=0)
    assert tokenizer.decode(ids) == text == tokenizer.decode(tokenizer.encode(text))
    assert len(text) / MAX_WORD < len(ids) < len(text)


def test_training_is_deterministic_across_processes():
    captions = [f"{caption}\n" for caption in open_source("shapes:500", 32).captions()]
    runs = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command, text = [sys.executable, "-c", TRAIN], "".join(captions)
        done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        runs.append(done.stdout.strip())
    here = Tokenizer.train(captions, 400)._bpe.to_str()
    assert runs == [here, here]


def test_vocabulary_holds_the_bytes_first_and_stops_when_the_captions_do(tokenizer):
    vocabulary = json.loads(tokenizer._bpe.to_str())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size))
    assert {token for token, i in vocabulary.items() if i < 256} == set(ALPHABET)
    assert Tokenizer.train(["a b"], 10_000).vocab_size == 258
    assert Tokenizer.train([], 256).vocab_size == 256
    with pytest.raises(UserError, match="vocabulary size 255"):
        Tokenizer.train(["a"], 255)


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    text = "Three GREEN crosses ☕"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.encode(text, dropout=0.5, seed=9) == tokenizer.encode(text, dropout=0.5, seed=9)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_an_unusable_file_is_rejected(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    good = path.read_text(encoding="utf-8")
    other = json.loads(good)
    for bad in [
        "",
        "no json",
        "{}",
        "[1, 2]",
        good[: len(good) // 2],
        json.dumps({**other, "model": {**other["model"], "dropout": 0.5}}),
        json.dumps({**other, "normalizer": None}),
        json.dumps({**other, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}),
    ]:
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            Tokenizer.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    for file in (path, tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError, match=r"cannot be read|does not exist|is not a regular file") as caught:
            Tokenizer.load(file)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("text", ["", " ", "\n\t\u3000", None, 7, b"bytes", ["a"], "caf\udce9"])
def test_invalid_text_is_rejected(tokenizer, text, dropout):
    with pytest.raises(UserError, match=r"the text"):
        tokenizer.encode(text, dropout=dropout)


def test_wrong_arguments(tokenizer):
    for dropout in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="dropout"):
            tokenizer.encode("a", dropout=dropout)
    for ids in ([-1], [0, tokenizer.vocab_size]):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode(ids)
    assert tokenizer.decode([]) == ""
