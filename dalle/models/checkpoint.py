"""Model files: each part of a model has a configuration as JSON and weights as safetensors in the model directory."""

import hashlib
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from dalle import config as configs
from dalle.errors import UserError
from dalle.files import read_tensors, write_json, write_tensors
from dalle.models.clip import CLIP, CLIPConfig
from dalle.models.dvae import DiscreteVAE, DiscreteVAEConfig
from dalle.models.prior import Prior, PriorConfig

Model = TypeVar("Model", bound=nn.Module)


def save_part(directory: Path, name: str, model: nn.Module) -> None:
    """Writes `name`.json and `name`.safetensors, each atomically."""
    write_tensors(Path(directory) / f"{name}.safetensors", model.state_dict())
    write_json(Path(directory) / f"{name}.json", model.config)


def load_dvae(directory: Path) -> DiscreteVAE:
    """Loads the dVAE of a model directory, on the CPU; raises UserError if it is missing or damaged."""
    return _load_part(directory, "dvae", DiscreteVAE, DiscreteVAEConfig)


def load_prior(directory: Path) -> Prior:
    """Loads the prior of a model directory, on the CPU; raises UserError if it is missing or damaged."""
    return _load_part(directory, "prior", Prior, PriorConfig)


def load_clip(directory: Path) -> CLIP:
    """Loads the CLIP of a model directory, on the CPU; raises UserError if it is missing or damaged."""
    return _load_part(directory, "clip", CLIP, CLIPConfig)


def load_weights(module: nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Loads a state dict; raises a UserError that names `origin` and the first tensor whose name or shape differs."""
    expected = module.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        ours = list(expected[name].shape) if name in expected else "absent"
        theirs = list(tensors[name].shape) if name in tensors else "absent"
        if ours != theirs:
            raise UserError(f"{origin} belongs to another configuration: {name} is {theirs} there and {ours} here")
    module.load_state_dict(tensors)


def fingerprint(model: nn.Module) -> str:
    """A digest of the weights, to detect codes or checkpoints that belong to other weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()[:16]


def _load_part(directory: Path, name: str, model_class: type[Model], config_class: type) -> Model:
    settings, weights = (Path(directory) / f"{name}.{suffix}" for suffix in ("json", "safetensors"))
    if not settings.exists():
        raise UserError(
            f"{directory} has no {settings.name}, so it holds no {name}: give the directory of a trained model"
        )
    model = model_class(configs.from_dict(config_class, configs.read_json(settings), str(settings)))
    tensors, _ = read_tensors(weights)
    load_weights(model, tensors, str(weights))
    return model.eval()
