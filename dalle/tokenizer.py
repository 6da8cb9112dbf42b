"""Byte-level BPE over lower-cased text, with BPE dropout (Provilkov et al. 2020) for training.

Converted models have a BPE of characters instead, in which a token stands for what their training did not contain.
"""

import functools
import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

# Captions are encoded one at a time, so the library's threads gain nothing, and forking after their use warns.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from dalle.errors import UserError
from dalle.files import read_text

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes, so that any text can be encoded
BPE_OPTIONS = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip
RUDALLE, MINDALLE = "rudalle", "mindalle"  # kinds of tokenizers, besides byte-level ones
MAX_WORD = 64  # longer words are split before merging with dropout, because the merge loop is quadratic


class Tokenizer:
    """Converts text to token ids in [0, vocab_size) and back. There are no special tokens: the prior adds its own.

    Text is NFC-normalised and lower-cased (Ramesh et al. 2021, App. B.1); whitespace collapses to single spaces.
    """

    def __init__(self, bpe: tokenizers.Tokenizer) -> None:
        self._bpe = bpe

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns the merges from ``captions``. The same captions in the same order give the same tokenizer.

        The vocabulary is smaller than ``vocab_size`` if the captions run out of pairs to merge. Raises UserError if
        ``vocab_size`` is below 256.
        """
        if vocab_size < len(ALPHABET):
            raise UserError(f"vocabulary size {vocab_size} is too small: the bytes alone take {len(ALPHABET)}")
        bpe = _of_bytes({}, [])
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=ALPHABET, show_progress=False)
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe)

    @classmethod
    def of_kind(cls, kind: str, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> "Tokenizer":
        """A BPE of characters of another project, ``RUDALLE`` or ``MINDALLE``.

        Raises ValueError if the ids are not 0, 1, 2, ..., or there is no token for unknown characters.
        """
        bpe = KINDS[kind](dict(vocab), list(merges))
        if not _is_ours(bpe):
            raise ValueError(f"its {len(vocab)} tokens are not numbered from 0, or lack {bpe.model.unk_token}")
        return cls(bpe)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._bpe.to_str() == other._bpe.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._bpe.get_vocab_size()

    def encode(self, text: str, dropout: float = 0.0, seed: int | None = None) -> list[int]:
        """Token ids of ``text``, at least one.

        Args:
            text: a non-empty string.
            dropout: probability of skipping each possible merge, so that one text has many segmentations.
            seed: seed of the dropout; None takes a random one.

        Raises:
            UserError: ``text`` is not a string, is empty, or is not valid Unicode.
            ValueError: ``dropout`` is not in [0, 1].
        """
        _check_text(text)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout {dropout} is not in [0, 1]")
        if dropout == 0.0:
            return self._bpe.encode(text, add_special_tokens=False).ids
        uniform = random.Random(seed).random
        words = self._bpe.pre_tokenizer.pre_tokenize_str(self._bpe.normalizer.normalize_str(text))
        suffix = self._bpe.model.end_of_word_suffix or ""
        characters = ([*word[:-1], word[-1] + suffix] for word, _ in words)
        pieces = (word[i : i + MAX_WORD] for word in characters for i in range(0, len(word), MAX_WORD))
        tokens = (token for piece in pieces for token in _merge(piece, self._ranks, dropout, uniform))
        return self._ids(tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; invalid UTF-8 becomes U+FFFD. Raises ValueError for an id outside the vocabulary."""
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"token {outside[0]} is outside the vocabulary of {self.vocab_size}")
        return self._bpe.decode(list(ids), skip_special_tokens=False).removeprefix(" ")

    def save(self, path: str | Path) -> None:
        """Writes a single JSON file in the format of the `tokenizers` library."""
        Path(path).write_text(self._bpe.to_str(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a file that ``save`` wrote; raises UserError if it is missing, damaged or of another kind."""
        try:
            bpe = tokenizers.Tokenizer.from_str(read_text(Path(path)))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer file, or is damaged: {error}") from error
        if not _is_ours(bpe):
            raise UserError(f"{path} is another kind of tokenizer: train one with dalle")
        return cls(bpe)

    def _ids(self, tokens: Iterable[str]) -> list[int]:
        ids, known, model = [], True, self._bpe.model
        for token in tokens:
            if token in self._vocab:
                ids.append(self._vocab[token])
            elif known or not model.fuse_unk:
                ids.append(self._vocab[model.unk_token])
            known = token in self._vocab
        return ids

    @functools.cached_property
    def _vocab(self) -> dict[str, int]:
        return self._bpe.get_vocab()

    @functools.cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        merges = json.loads(self._bpe.to_str())["model"]["merges"]
        return {(left, right): rank for rank, (left, right) in enumerate(merges)}


def _merge(
    word: Iterable[str], ranks: dict[tuple[str, str], int], dropout: float, uniform: Callable[[], float]
) -> list[str]:
    """Applies the learned merges to one word, best rank first, skipping each with probability ``dropout``.

    The library's own dropout cannot be seeded, so training could not resume exactly with it.
    """
    tokens = list(word)
    while True:
        mergeable = [
            (ranks[pair], i)
            for i, pair in enumerate(itertools.pairwise(tokens))
            if pair in ranks and uniform() >= dropout
        ]
        if not mergeable:
            return tokens
        _, i = min(mergeable)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"the text must be a string, not {type(text).__name__}")
    if not text.strip():
        raise UserError(f"the text {text!r} is empty: give at least one word")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"the text {text!r} is not valid Unicode: give UTF-8 text") from None


Vocab, Merges = dict[str, int], list[tuple[str, str]]


def _of_bytes(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges))
    collapse = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), *collapse])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a word has the same tokens when first
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _of_rudalle(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    """YouTokenToMe's: words begin with "▁"; unknown characters in a row are one token."""
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<UNK>", fuse_unk=True))
    collapse = [normalizers.Replace(Regex(r"[\s▁]+"), " "), normalizers.Strip()]
    bpe.normalizer = normalizers.Sequence([normalizers.Lowercase(), *collapse])
    bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    bpe.decoder = decoders.Metaspace("▁", "always")
    return bpe


def _of_mindalle(vocab: Vocab, merges: Merges) -> tokenizers.Tokenizer:
    """`tokenizers.CharBPETokenizer`: words and punctuation end with "</w>"."""
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="[UNK]", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bpe.decoder = decoders.BPEDecoder("</w>")
    return bpe


KINDS = {"bytes": _of_bytes, RUDALLE: _of_rudalle, MINDALLE: _of_mindalle}


def _is_ours(bpe: tokenizers.Tokenizer) -> bool:
    """Whether it differs from a tokenizer of this module in the vocabulary and the merges alone."""
    if not isinstance(bpe.model, models.BPE) or bpe.get_added_tokens_decoder():
        return False
    vocab, unknown = bpe.get_vocab(), bpe.model.unk_token
    return (
        any(_settings(bpe) == _settings(kind({}, [])) for kind in KINDS.values())
        and set(vocab.values()) == set(range(len(vocab)))
        and vocab.keys() >= set(ALPHABET if unknown is None else [unknown])
    )


def _settings(bpe: tokenizers.Tokenizer) -> list:
    components = bpe.normalizer, bpe.pre_tokenizer, bpe.decoder, bpe.post_processor
    return [
        *(component and component.__getstate__() for component in components),
        bpe.truncation,
        bpe.padding,
        *(getattr(bpe.model, name) for name in BPE_OPTIONS),
    ]
