"""minDALL-E's prior and tokenizer."""

import re
from collections.abc import Mapping
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from dalle.conversion.reading import load_renamed, read_state_dict, take
from dalle.errors import UserError
from dalle.files import read_text
from dalle.models.variant import VariantPrior, VariantPriorConfig
from dalle.tokenizer import MINDALLE, Tokenizer

PADDING = "[PAD]"
THEIR_NAMES = {
    r"^layers\.(\d+)\.": r"blocks.\1.",
    r"\.attention_norm\.": ".ln1.",
    r"\.attention_out\.": ".attn.proj.",
    r"\.mlp_norm\.": ".ln2.",
    r"\.mlp_in\.": ".mlp.0.",
    r"\.mlp_out\.": ".mlp.2.",
    r"^norm\.": "ln_f.",
    r"^text_position\.": "pos_emb_txt.",
    r"^image_embedding\.": "tok_emb_img.",
    r"^image_position\.": "pos_emb_img.",
    r"^image_head\.weight": "head_img.weight",
}  # of ours


def read_mindalle(path: Path, padding: int) -> VariantPrior:
    """Reads a checkpoint, on the CPU. Raises a UserError that names the first tensor that differs.

    Args:
        path: the file.
        padding: id of the token with which text is padded.
    """
    config = VariantPriorConfig.preset("mindalle")
    found, width = read_state_dict(path), config.width
    projections = {
        f"blocks.{layer}.attn.{name}.{kind}": (width, width)[: 2 if kind == "weight" else 1]
        for layer in range(config.layers)
        for name in ("query", "key", "value")
        for kind in ("weight", "bias")
    }
    text = dict.fromkeys(("tok_emb_txt.weight", "head_txt.weight"), (config.text_vocab, width))
    theirs = take(found, projections | text, path)
    with torch.device("meta"):
        prior = VariantPrior(config)
    prior = prior.to_empty(device="cpu")
    load_renamed(prior, found | _joined(theirs, config, padding), _their_name, path)
    return prior.eval()


def _joined(theirs: Mapping[str, Tensor], config: VariantPriorConfig, padding: int) -> dict[str, Tensor]:
    """Our tensors that differ: one projection in place of three, padding per position, biases of the heads.

    The padding token that ends a text is its end, for which our head has a row of its own.
    """
    embedding, head = theirs["tok_emb_txt.weight"], theirs["head_txt.weight"]
    joined = {
        "text_embedding.weight": torch.cat([embedding, embedding[padding].expand(1 + config.text_len, -1)]),
        "text_head.weight": torch.cat([head, head[padding, None]]),
        "text_head.bias": torch.zeros(config.text_vocab + 1),
        "image_head.bias": torch.zeros(config.image_vocab),
    }
    for layer in range(config.layers):
        for kind in ("weight", "bias"):
            parts = [theirs[f"blocks.{layer}.attn.{name}.{kind}"] for name in ("query", "key", "value")]
            joined[f"layers.{layer}.qkv.{kind}"] = torch.cat(parts)
    return joined


def _their_name(name: str) -> str:
    if ".qkv." in name:
        return name
    for pattern, theirs in THEIR_NAMES.items():
        name = re.sub(pattern, theirs, name)
    return name


def read_tokenizer(vocab: Path, merges: Path) -> tuple[Tokenizer, int]:
    """Reads a tokenizer, and the id of its padding token. Raises a UserError that names the files if they are damaged.

    Args:
        vocab: JSON, tokens with their ids.
        merges: text, one merge per line.
    """
    for path in (vocab, merges):
        read_text(path)  # that they can be read
    try:
        tokens, pairs = tokenizers.models.BPE.read_file(str(vocab), str(merges))
        tokenizer = Tokenizer.of_kind(MINDALLE, tokens, pairs)
        return tokenizer, tokens[PADDING]
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{vocab} and {merges.name} are no tokenizer of minDALL-E, or damaged: {error}") from error
