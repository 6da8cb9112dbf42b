"""A training run on disk: one safetensors file, replaced atomically, from which training goes on exactly."""

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


@dataclass
class State:
    """What changes while a model trains."""

    model: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Updates done."""
    elapsed: float = 0.0
    """Seconds of training, those before a resume included."""


def save(path: Path, state: State, identity: dict) -> None:
    """Writes the run; `identity` is what a run must have in common with it to go on from it."""
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in state.average.state_dict().items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in slots.items()}
    header = {"format": FORMAT, "step": state.step, "elapsed": state.elapsed, "identity": identity}
    write_tensors(path, tensors, {key: json.dumps(value) for key, value in header.items()})


def load(path: Path, state: State, identity: dict) -> None:
    """Brings `state` to where `path` left off.

    Raises:
        UserError: the file is missing, damaged, not a training run, or one of another identity.
    """
    tensors, metadata = read_tensors(path)
    header = _header(metadata, path)
    theirs = header["identity"]
    for key in sorted(identity.keys() | theirs.keys()):
        if identity.get(key) != theirs.get(key):
            raise UserError(
                f"{path} was trained with {key} = {theirs.get(key)!r}, not {identity.get(key)!r}: "
                "resume with the former or start anew in another directory"
            )
    load_weights(state.model, _part(tensors, "model"), str(path))
    load_weights(state.average, _part(tensors, "average"), str(path))
    _load_optimizer(state.optimizer, _part(tensors, "optimizer"))
    state.step, state.elapsed = header["step"], header["elapsed"]


def _header(metadata: dict[str, str], path: Path) -> dict:
    try:
        header = {key: json.loads(value) for key, value in metadata.items()}
    except json.JSONDecodeError:
        header = {}
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is not a training run of this version; start anew in another directory")
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
            # In the parameter's memory order (channels last), for the fused optimiser walks both side by side.
            tensor = torch.empty_like(parameter, requires_grad=False, device="cpu").copy_(tensor)
        state.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
