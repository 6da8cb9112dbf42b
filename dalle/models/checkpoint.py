"""The parts of a model in its directory: a configuration as JSON and weights as safetensors for each."""

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


def load_weights(module: nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Fills `module`; a UserError that names `origin` and the first misfit if the names or shapes differ."""
    wanted = module.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        here = list(wanted[name].shape) if name in wanted else "absent"
        there = list(tensors[name].shape) if name in tensors else "absent"
        if here != there:
            raise UserError(f"{origin} belongs to another configuration: {name} is {there} there and {here} here")
    module.load_state_dict(tensors)


def fingerprint(model: nn.Module) -> str:
    """A digest of the weights: codes of one encoder mean nothing to another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()[:16]


def _load_part(directory: Path, name: str, model_class: type[Model], config_class: type) -> Model:
    settings, weights = (Path(directory) / f"{name}.{suffix}" for suffix in ("json", "safetensors"))
    if not settings.exists():
        raise UserError(
            f"{directory} has no {settings.name}, so it holds no {name}: name the directory of a trained model"
        )
    model = model_class(configs.from_dict(config_class, configs.read_json(settings), str(settings)))
    tensors, _ = read_tensors(weights)
    load_weights(model, tensors, str(weights))
    return model.eval()
