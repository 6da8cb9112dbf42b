"""Model files: each part of a model has a configuration as JSON and weights as safetensors in the model directory.

The metadata of the weights say what belongs to them: a digest of the configuration and, for the prior and CLIP,
fingerprints of the dVAE and the tokenizer that they were trained with.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dalle import config as configs
from dalle.errors import UserError
from dalle.files import digest, read_header, read_json, read_tensors, read_text, write_json, write_tensors
from dalle.models.clip import CLIP, CLIPConfig
from dalle.models.dvae import DiscreteVAE, DiscreteVAEConfig
from dalle.models.prior import Prior, PriorConfig
from dalle.models.variant import VariantPrior, VariantPriorConfig
from dalle.models.vqgan import VQGAN, ImageTokenizer, VQGANConfig
from dalle.tokenizer import Tokenizer

# The models that each part may be, by the class that its configuration names; the first is not named.
MODELS: dict[str, dict[str, tuple[type[nn.Module], type[Any]]]] = {
    "dvae": {"DiscreteVAE": (DiscreteVAE, DiscreteVAEConfig), "VQGAN": (VQGAN, VQGANConfig)},
    "prior": {"Prior": (Prior, PriorConfig), "VariantPrior": (VariantPrior, VariantPriorConfig)},
    "clip": {"CLIP": (CLIP, CLIPConfig)},
}
MADE_WITH = {"dvae": "dVAE", "tokenizer": "tokenizer"}  # keys of `made_with`, and their names in messages


class Parts(NamedTuple):
    """The parts of a model directory."""

    dvae: ImageTokenizer
    prior: Prior
    tokenizer: Tokenizer
    clip: CLIP | None


def save_part(directory: Path, name: str, model: nn.Module, made_with: Mapping[str, str] | None = None) -> None:
    """Writes `name`.json and `name`.safetensors, each atomically; `made_with` is that of the data it was trained on."""
    config = description(name, model)
    weights = Path(directory) / f"{name}.safetensors"
    write_tensors(weights, model.state_dict(), {"config": _config_digest(config), **(made_with or {})})
    write_json(Path(directory) / f"{name}.json", config)


def description(name: str, model: nn.Module) -> dict[str, Any]:
    """The content of `name`.json: the fields of the configuration, after the class if it is not the published model."""
    config, named = configs.to_dict(model.config), type(model).__name__
    return config if named == next(iter(MODELS[name])) else {"class": named, **config}


def load_parts(directory: Path) -> Parts:
    """Loads all parts of a model directory, on the CPU.

    Raises a UserError if one is missing or damaged, or the prior or the CLIP was trained with another dVAE or
    tokenizer. Warns if the files are of an earlier version, which did not record it.
    """
    dvae, prior, tokenizer = load_dvae(directory), load_prior(directory), Tokenizer.load(directory / "tokenizer.json")
    clip = load_clip(directory) if (directory / "clip.json").exists() else None
    ours, unknown = made_with(directory, dvae), []
    for name in ("prior",) if clip is None else ("prior", "clip"):
        path = directory / f"{name}.safetensors"
        _, metadata = read_header(path)
        check_made_with(path, metadata, ours, f"train the {name} again, or choose another directory")
        unknown += [path.name] if not ours.keys() <= metadata.keys() else []
    if unknown:
        warnings.warn(
            f"{directory} was written by an earlier version, and does not record which dVAE and tokenizer belong to "
            f"{' and '.join(unknown)}: if images look wrong, train again (`dalle export` records it)",
            stacklevel=2,
        )
    return Parts(dvae, prior, tokenizer, clip)


def load_dvae(directory: Path) -> ImageTokenizer:
    """Loads the dVAE of a model directory, on the CPU; raises UserError if it is missing or damaged."""
    return _load_part(directory, "dvae")


def load_prior(directory: Path) -> Prior:
    """Loads the prior of a model directory, on the CPU; raises UserError if it is missing or damaged."""
    return _load_part(directory, "prior")


def load_clip(directory: Path) -> CLIP:
    """Loads the CLIP of a model directory, on the CPU; raises UserError if it is missing or damaged."""
    return _load_part(directory, "clip")


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Loads a state dict; raises a UserError that names `origin` and the first tensor that does not fit the module."""
    check_shapes(module.state_dict(), tensors, origin)
    module.load_state_dict(tensors)
    for name, tensor in module.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{origin} is damaged: {name} holds values that are not finite; create it again")


def made_with(directory: Path, dvae: ImageTokenizer) -> dict[str, str]:
    """Fingerprints of what codes and their models depend on: the encoder of the dVAE, and the tokenizer there."""
    return {"dvae": fingerprint(dvae.encoder), "tokenizer": digest(read_text(Path(directory) / "tokenizer.json"))}


def check_made_with(path: Path, metadata: Mapping[str, str], ours: Mapping[str, str], fix: str) -> None:
    """Raises a UserError, with advice, if the file at `path` says that it was made with anything but `ours`."""
    for key, value in ours.items():
        if metadata.get(key, value) != value:
            raise UserError(f"{path} was made with another {MADE_WITH[key]} than {path.parent} holds: {fix}")


def fingerprint(model: nn.Module) -> str:
    """A digest of the weights, to detect codes or checkpoints that belong to other weights."""
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {list(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().float().contiguous().numpy())
    return content.hexdigest()[:16]


def _load_part(directory: Path, name: str) -> Any:
    settings, weights = (Path(directory) / f"{name}.{suffix}" for suffix in ("json", "safetensors"))
    if not settings.exists():
        raise UserError(
            f"{directory} has no {settings.name}, so it holds no {name}: give the directory of a trained model"
        )
    data = read_json(settings)
    model_class, config_class = _classes(name, data, settings)
    fields = {key: value for key, value in data.items() if key != "class"} if isinstance(data, dict) else data
    config = configs.from_dict(config_class, fields, str(settings))
    header, metadata = read_header(weights)
    if config.residual_blocks > len(header):  # before anything of a size that a stranger chose is built
        raise UserError(
            f"{weights} belongs to another configuration: it has {len(header)} tensors, too few for "
            f"the {config.residual_blocks} residual blocks of {settings.name}"
        )
    check_shapes(_shapes(model_class, config, settings), header, str(weights))
    if metadata.get("config", _config_digest(data)) != _config_digest(data):
        raise UserError(f"{settings} does not belong to {weights.name}: one of them is damaged or was replaced")
    model = model_class(config)
    load_weights(model, read_tensors(weights)[0], str(weights))
    return model.eval()


def _classes(name: str, data: Any, settings: Path) -> tuple[type[nn.Module], type[Any]]:
    """The classes of a part's model and configuration."""
    named = data.get("class") if isinstance(data, dict) else None
    if named is None:
        return next(iter(MODELS[name].values()))
    if not isinstance(named, str) or named not in MODELS[name]:
        raise UserError(f"{settings} is of the class {named!r:.80}, not one of {', '.join(MODELS[name])}")
    return MODELS[name][named]


def _shapes(model_class: type[nn.Module], config: Any, settings: Path) -> dict[str, Tensor]:
    """The state dict of a model on the meta device, which takes no memory."""
    try:
        with torch.device("meta"), _WithoutNoise():
            return model_class(config).state_dict()
    except RuntimeError as error:
        raise UserError(f"{settings} describes a model that is too large: {str(error).splitlines()[0]}") from error


class _WithoutNoise(TorchFunctionMode):
    """Leaves out the normal initialisation, for which the meta device would import torch._dynamo, in two seconds."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def check_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: str) -> None:
    for name in sorted(expected.keys() | found.keys()):
        ours = list(expected[name].shape) if name in expected else "absent"
        theirs = list(found[name].shape) if name in found else "absent"
        if ours != theirs:
            raise UserError(f"{origin} belongs to another configuration: {name} is {theirs} there and {ours} here")
        if expected[name].is_floating_point() != found[name].is_floating_point():  # floats may be of any precision
            raise UserError(f"{origin} is damaged: {name} is {found[name].dtype}, not {expected[name].dtype}")


def _config_digest(config: dict[str, Any]) -> str:
    return digest(json.dumps(config, sort_keys=True))
