"""The files of a model directory: a configuration as JSON and weights as safetensors for each part."""

import hashlib
from pathlib import Path

from torch import nn

from dalle import config as configs
from dalle.clip import CLIP, CLIPConfig
from dalle.dvae import DiscreteVAE, DiscreteVAEConfig
from dalle.errors import UserError
from dalle.files import load_weights, read_tensors, write_json, write_tensors
from dalle.prior import Prior, PriorConfig


def save_part(directory: Path, name: str, model: nn.Module) -> None:
    """Writes `name`.json and `name`.safetensors."""
    write_tensors(Path(directory) / f"{name}.safetensors", model.state_dict())
    write_json(Path(directory) / f"{name}.json", model.config)


def load_dvae(directory: Path) -> DiscreteVAE:
    """The dVAE of a model directory, on the CPU; a UserError if there is none or it is damaged."""
    return _load_part(directory, "dvae", DiscreteVAE, DiscreteVAEConfig)


def load_prior(directory: Path) -> Prior:
    """The prior of a model directory, on the CPU; a UserError if there is none or it is damaged."""
    return _load_part(directory, "prior", Prior, PriorConfig)


def load_clip(directory: Path) -> CLIP:
    """The CLIP of a model directory, on the CPU; a UserError if there is none or it is damaged."""
    return _load_part(directory, "clip", CLIP, CLIPConfig)


def fingerprint(model: nn.Module) -> str:
    """A digest of the weights: codes of one encoder mean nothing to another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()[:16]


def _load_part(directory: Path, name: str, model_class: type, config_class: type) -> nn.Module:
    settings, weights = (Path(directory) / f"{name}.{suffix}" for suffix in ("json", "safetensors"))
    if not settings.exists():
        raise UserError(
            f"{directory} has no {settings.name}, so it holds no {name}: name the directory of a trained model"
        )
    model = model_class(configs.from_dict(config_class, configs.read_json(settings), str(settings)))
    tensors, _ = read_tensors(weights)
    load_weights(model, tensors, str(weights))
    return model.eval()
