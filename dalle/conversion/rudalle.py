"""ruDALL-E's priors (Malevich, Kandinsky and those trained from them), versions 2 and 3."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import dalle_kernels as dk
from dalle.conversion.reading import load_renamed, read_state_dict, take
from dalle.errors import UserError
from dalle.models.variant import VariantPrior, VariantPriorConfig

PRESETS = ("malevich", "kandinsky")
THEIR_NAMES = {
    r"^layers\.(\d+)\.": r"transformer.layers.\1.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.qkv\.": ".attention.query_key_value.",
    r"\.attention_out\.": ".attention.dense.",
    r"\.attention_out_norm\.": ".before_first_addition_layernorm.",
    r"\.mlp_norm\.": ".post_attention_layernorm.",
    r"\.mlp_in\.": ".mlp.dense_h_to_4h.",
    r"\.mlp_out\.": ".mlp.dense_4h_to_h.",
    r"\.mlp_out_norm\.": ".before_second_addition_layernorm.",
    r"^norm\.0\.": "transformer.final_layernorm.",
    r"^norm\.1\.": "to_logits.0.",
    r"^image_embedding\.": "image_embeddings.",
    r"^row_embedding\.": "image_row_embeddings.",
    r"^column_embedding\.": "image_col_embeddings.",
}  # of ours


def read_rudalle(path: Path) -> VariantPrior:
    """Reads a state dict, on the CPU. Raises a UserError that names the first tensor that differs."""
    found = read_state_dict(path)
    masks = {name.split(".")[-1]: found.pop(name) for name in list(found) if name.endswith("_mask")}
    config = _config(found, path)
    rows = config.text_vocab + config.text_len + config.image_vocab
    embeddings = {
        "text_embeddings.weight": (config.text_vocab + config.text_len, config.width),
        "text_pos_embeddings.weight": (config.text_len + 1, config.width),
        "to_logits.1.weight": (rows, config.width),
        "to_logits.1.bias": (rows,),
    }
    theirs = take(found, embeddings, path)
    config = _with_version(config, masks.get("conv_mask"), path)
    with torch.device("meta"):
        prior = VariantPrior(config)
    prior = prior.to_empty(device="cpu")
    load_renamed(prior, found | _split(theirs, config), _their_name, path)
    return prior.eval()


def _config(found: Mapping[str, Tensor], path: Path) -> VariantPriorConfig:
    """The configuration of the preset with the width of the weights; as of version 3."""
    embedding = found.get("text_embeddings.weight")
    presets = [VariantPriorConfig.preset(name) for name in PRESETS]
    for config in presets:
        if embedding is not None and embedding.shape[-1] == config.width:
            return config
    shape = "absent" if embedding is None else list(embedding.shape)
    raise UserError(
        f"{path} is not a prior of ruDALL-E: text_embeddings.weight is {shape} there, and has "
        f"{' or '.join(str(config.width) for config in presets)} columns in its models"
    )


def _with_version(config: VariantPriorConfig, mask: Tensor | None, path: Path) -> VariantPriorConfig:
    """The configuration of the version, which only the stored mask of the last layer tells."""
    if mask is not None:
        for edge in ("clip", "torus"):
            pattern = dk.AttentionPattern.conv(config.text_len, config.grid, config.conv_kernel, edge)
            if mask.numel() == pattern.seq_len**2 and torch.equal(mask.reshape(-1) != 0, pattern.dense().flatten()):
                if edge == "clip":
                    return config
                return replace(config, attention=edge, text_len=config.text_len + 1, prefix=(2, 2))
    shape = "absent" if mask is None else list(mask.shape)
    raise UserError(f"{path} is of neither version 2 nor 3 of ruDALL-E: conv_mask, {shape}, is that of neither")


def _split(theirs: Mapping[str, Tensor], config: VariantPriorConfig) -> dict[str, Tensor]:
    """Our embeddings and heads.

    Their text table has tokens, then padding; ours has a start token in between, which is unused here, and so is, in
    version 2, where all text is one position later, the padding of the first position.
    """
    vocab, text = config.text_vocab, theirs["text_embeddings.weight"]
    later = config.text_len + vocab - len(text)
    image = len(text)  # first row of the image tokens in the common head
    weight, bias = theirs["to_logits.1.weight"], theirs["to_logits.1.bias"]
    return {
        "text_embedding.weight": torch.cat([text[: vocab + 1 + later], text[vocab:]]),
        "text_position.weight": theirs["text_pos_embeddings.weight"][: config.text_len],
        "text_head.weight": weight[: vocab + 1],
        "text_head.bias": bias[: vocab + 1],
        "image_head.weight": weight[image:],
        "image_head.bias": bias[image:],
    }


def _their_name(name: str) -> str:
    for pattern, theirs in THEIR_NAMES.items():
        name = re.sub(pattern, theirs, name)
    return name
