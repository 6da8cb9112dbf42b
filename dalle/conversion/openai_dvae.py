"""OpenAI's published dVAE, `encoder.pkl` and `decoder.pkl`: pickled modules of the package dall_e."""

import re
from pathlib import Path

import torch

from dalle.conversion.reading import load_renamed, read_module
from dalle.models.dvae import DiscreteVAE, DiscreteVAEConfig

CLASSES = frozenset(
    {"dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock"}
    | {"dall_e.utils.Conv2d", "torch.nn.modules.container.Sequential", "torch.nn.modules.linear.Identity"}
    | {"torch.nn.modules.activation.ReLU", "torch.nn.modules.pooling.MaxPool2d", "torch.nn.modules.upsampling.Upsample"}
)
THEIR_NAMES = (
    (r"^(input)\.", r"blocks.\1."),
    (r"^output\.", "blocks.output.conv."),
    (r"^groups\.(\d+)\.(\d+)\.", lambda m: f"blocks.group_{int(m[1]) + 1}.block_{int(m[2]) + 1}."),
    (r"\.res_path\.(\d+)\.", lambda m: f".res_path.conv_{int(m[1]) + 1}."),
    (r"\.(w)eight$|\.(b)ias$", lambda m: f".{m[1] or m[2]}"),
)  # of ours


def read_openai_dvae(directory: Path) -> DiscreteVAE:
    """Reads `encoder.pkl` and `decoder.pkl`. Raises a UserError that names the first tensor that differs."""
    with torch.device("meta"):
        dvae = DiscreteVAE(DiscreteVAEConfig.preset("dalle"))
    dvae = dvae.to_empty(device="cpu")
    for name, module in (("encoder", dvae.encoder), ("decoder", dvae.decoder)):
        path = Path(directory) / f"{name}.pkl"
        load_renamed(module, read_module(path, CLASSES), _their_name, path)
    return dvae.eval()


def _their_name(name: str) -> str:
    for pattern, theirs in THEIR_NAMES:
        name = re.sub(pattern, theirs, name)
    return name
