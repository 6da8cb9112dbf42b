"""Checkpoints of taming-transformers' VQGAN, with a codebook or with Gumbel-softmax."""

import re
from pathlib import Path

from dalle.conversion.reading import load_renamed, read_state_dict
from dalle.models.vqgan import VQGAN, VQGANConfig


def read_vqgan(path: Path, config: VQGANConfig) -> VQGAN:
    """Reads a checkpoint, on the CPU. Raises a UserError that names the first tensor that differs."""
    found = read_state_dict(path)
    vqgan = VQGAN(config)
    # The discriminator of training is left out.
    found = {name: tensor for name, tensor in found.items() if not name.startswith("loss.")}
    codebook = found.get("quantize.embedding.weight")
    if codebook is not None and codebook.ndim == 2:  # the nearest vector has the largest logit: see VQGAN
        found["quantize.proj.weight"] = 2 * codebook[:, :, None, None]
        found["quantize.proj.bias"] = -codebook.double().square().sum(1)

    def their_name(name: str) -> str:
        return _their_name(name, "embed" if codebook is None else "embedding")

    load_renamed(vqgan, found, their_name, path)
    return vqgan.eval()


def _their_name(name: str, codebook: str) -> str:
    name = re.sub(r"^(encoder|decoder)\.((?:post_)?quant_conv)", r"\2", name)
    name = name.replace("encoder.output.", "quantize.proj.").replace("decoder.embedding.", f"quantize.{codebook}.")
    return re.sub(r"\.(up|down)\.(\d+)\.scale\.", r".\1.\2.\1sample.conv.", name)
