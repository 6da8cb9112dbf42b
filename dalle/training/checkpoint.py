"""Training checkpoints: one safetensors file, replaced atomically, from which training resumes exactly."""

import json
import math
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
FINGERPRINTS = {
    "digest of the images": "other images",
    "captions": "other captions",
    "tokenizer": "another tokenizer",
    "dvae": "another dVAE",
    "dvae, decoder included": "another dVAE",
    "encoder": "another encoder",
    "initial weights": "other initial weights (--init)",
}  # keys of the identity whose values say nothing to people
ADDED = {"digest of the images", "caption_dropout", "new_tokenizer"}  # keys that older checkpoints lack
ELSEWHERE = "choose another directory"
SLOTS = ("exp_avg", "exp_avg_sq")  # of AdamW, each of the parameter's shape, besides "step"


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
    saved: int = 0
    """The step of the last checkpoint."""
    torn: bool = False
    """Whether an update has begun and not ended, so that weights, EMA and optimizer are not those of one step."""


def state_tensors(state: TrainingState) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name; not copies."""
    found = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    found |= {f"{EMA_PREFIX}.{name}": tensor for name, tensor in state.ema.state_dict().items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": tensor for name, tensor in slots.items()}
    return found


def save(path: Path, state: TrainingState, identity: dict) -> None:
    """Writes a checkpoint; a run can resume from it only if it has the same `identity`."""
    header = {"format": FORMAT, "step": state.step, "elapsed": state.elapsed, "identity": identity}
    write_tensors(path, state_tensors(state), {key: json.dumps(value) for key, value in header.items()})
    state.saved = state.step


def load(path: Path, state: TrainingState, identity: dict) -> None:
    """Loads a checkpoint into `state`.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint, or has another identity.
    """
    tensors, metadata = read_tensors(path)
    header = _header(metadata, path)
    theirs = {OLD_NAMES.get(key, key): value for key, value in header["identity"].items()}
    for key in sorted((identity.keys() | theirs.keys()) - (ADDED - theirs.keys())):
        if identity.get(key) != theirs.get(key):
            what = FINGERPRINTS.get(key, f"{key} = {theirs.get(key)!r}, not {identity.get(key)!r}")
            raise UserError(f"{path} was trained with {what}: resume with the former, or {ELSEWHERE}")
    load_weights(state.model, _part(tensors, "model"), str(path))
    load_weights(state.ema, _part(tensors, EMA_PREFIX), str(path))
    if int(state.ema.n_averaged) != header["step"]:
        raise UserError(f"{path} is damaged: step {header['step']} is not that of its weights; {ELSEWHERE}")
    _load_optimizer(state.optimizer, _part(tensors, "optimizer"), path)
    state.step, state.elapsed, state.saved = header["step"], header["elapsed"], header["step"]


def _header(metadata: dict[str, str], path: Path) -> dict:
    try:
        header = {key: json.loads(value) for key, value in metadata.items()}
    except (ValueError, RecursionError):
        header = {}
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is not a training checkpoint of this version: choose another directory")
    step, elapsed, identity = (header.get(key) for key in ("step", "elapsed", "identity"))
    whole = type(step) is int and step >= 0 and isinstance(identity, dict)
    if not whole or not isinstance(elapsed, (int, float)) or not 0 <= elapsed < math.inf:
        raise UserError(f"{path} is damaged: its header gives no valid step, time and identity; {ELSEWHERE}")
    return header


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], path: Path) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, slot = name.partition(".")
        state.setdefault(index, {})[slot] = tensor
    for index, slots in state.items():
        parameter = parameters[int(index)] if index in map(str, range(len(parameters))) else None
        # The fused optimiser writes as far as the parameter reaches, whatever the size of a slot.
        if parameter is None or not _are_slots_of(parameter, slots):
            raise UserError(f"{path} is damaged: optimizer.{index} is not the state of a parameter; {ELSEWHERE}")
        for name in SLOTS:
            # In the parameter's memory format (channels last), because the fused optimiser needs equal strides.
            slots[name] = torch.empty_like(parameter, requires_grad=False, device="cpu").copy_(slots[name])
    slots_of = {int(index): slots for index, slots in state.items()}
    optimizer.load_state_dict({"state": slots_of, "param_groups": optimizer.state_dict()["param_groups"]})


def _are_slots_of(parameter: Tensor, slots: dict[str, Tensor]) -> bool:
    found = {name: (slot.shape, slot.dtype) for name, slot in slots.items()}
    expected = dict.fromkeys(SLOTS, (parameter.shape, parameter.dtype)) | {"step": (torch.Size(), torch.float32)}
    return found == expected and all(slot.isfinite().all() for slot in slots.values())
