"""Tokenizers of YouTokenToMe, such as ruDALL-E's `bpe.model`: text files of characters, merges and special ids."""

from pathlib import Path

from dalle.errors import UserError
from dalle.files import read_text
from dalle.tokenizer import RUDALLE, Tokenizer

SPECIAL = ("<UNK>", "<PAD>", "<BOS>", "<EOS>")  # in the order of their ids in the last line; -1: there is none


def read_yttm(path: Path) -> Tokenizer:
    """Reads a model file. Raises a UserError that names it if it is missing, damaged or cannot be converted."""
    try:
        numbers = iter([int(word) for word in read_text(path).split()])
        characters, merges = next(numbers), next(numbers)
        tokens = {}
        for _ in range(characters):
            codepoint = next(numbers)
            _add(tokens, next(numbers), chr(codepoint))
        pairs = []
        for _ in range(merges):
            left, right = tokens[next(numbers)], tokens[next(numbers)]
            pairs.append((left, right))
            _add(tokens, next(numbers), left + right)
        for token in SPECIAL:
            if (index := next(numbers)) != -1:
                _add(tokens, index, token)
    except (ValueError, KeyError, OverflowError, StopIteration) as error:
        raise UserError(f"{path} is not a model of YouTokenToMe, or is damaged: download it again") from error
    vocab = {token: index for index, token in tokens.items()}
    if len(vocab) != len(tokens):
        raise UserError(f"{path} cannot be converted: two of its tokens are the same text")
    try:
        return Tokenizer.of_kind(RUDALLE, vocab, pairs)
    except ValueError as error:
        raise UserError(f"{path} cannot be converted: {error}") from error


def _add(tokens: dict[int, str], index: int, token: str) -> None:
    if index in tokens:
        raise ValueError(f"token {index} occurs twice")
    tokens[index] = token
