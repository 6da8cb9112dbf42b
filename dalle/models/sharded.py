"""Models whose weights are sharded over processes."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def with_whole_weights(model: Model) -> Model:
    """`model` itself or, if its weights are DTensors (as under FSDP2), a copy with the whole weights on every rank.

    The copy communicates once, when it is made: all ranks must make it, and each may then generate as much as it wants.
    FSDP2 gathers weights in `forward` only, and every time.
    """
    state = model.state_dict()
    if not any(hasattr(weights, "full_tensor") for weights in state.values()):
        return model
    from torch.distributed.fsdp import FSDPModule

    plain_class = next(kind for kind in type(model).mro() if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        copy = plain_class(model.config)
    whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state.items()}
    copy.load_state_dict(whole, assign=True)
    return copy.train(model.training)
