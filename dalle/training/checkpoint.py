"""Training checkpoints: one safetensors file, replaced atomically, from which training resumes exactly."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dalle.errors import UserError
from dalle.files import read_tensors, write_tensors
from dalle.models.checkpoint import load_weights

FORMAT = "dalle training run 1"
EMA_PREFIX = "average"  # of the EMA weights in the file
OLD_NAMES = {"average_decay": "ema_decay", "pictures": "images"}  # keys of the identity in older checkpoints


@dataclass
class TrainingState:
    """The state of a training run."""

    model: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Steps done."""
    elapsed: float = 0.0
    """Seconds of training, including those before a resume."""


def save(path: Path, state: TrainingState, identity: dict) -> None:
    """Writes a checkpoint; a run can resume from it only if it has the same `identity`."""
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    tensors |= {f"{EMA_PREFIX}.{name}": tensor for name, tensor in state.ema.state_dict().items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in slots.items()}
    header = {"format": FORMAT, "step": state.step, "elapsed": state.elapsed, "identity": identity}
    write_tensors(path, tensors, {key: json.dumps(value) for key, value in header.items()})


def load(path: Path, state: TrainingState, identity: dict) -> None:
    """Loads a checkpoint into `state`.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint, or has another identity.
    """
    tensors, metadata = read_tensors(path)
    header = _header(metadata, path)
    theirs = {OLD_NAMES.get(key, key): value for key, value in header["identity"].items()}
    for key in sorted(identity.keys() | theirs.keys()):
        if identity.get(key) != theirs.get(key):
            raise UserError(
                f"{path} was trained with {key} = {theirs.get(key)!r}, not {identity.get(key)!r}: "
                "resume with the former, or choose another directory"
            )
    load_weights(state.model, _part(tensors, "model"), str(path))
    load_weights(state.ema, _part(tensors, EMA_PREFIX), str(path))
    _load_optimizer(state.optimizer, _part(tensors, "optimizer"))
    state.step, state.elapsed = header["step"], header["elapsed"]


def _header(metadata: dict[str, str], path: Path) -> dict:
    try:
        header = {key: json.loads(value) for key, value in metadata.items()}
    except json.JSONDecodeError:
        header = {}
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is not a training checkpoint of this version: choose another directory")
    return header


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for name, tensor in tensors.items():
        index, slot = name.split(".")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            # In the parameter's memory format (channels last), because the fused optimiser needs equal strides.
            tensor = torch.empty_like(parameter, requires_grad=False, device="cpu").copy_(tensor)
        state.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
