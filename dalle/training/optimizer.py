"""AdamW with weight decay on matrices only, and the exponential moving average (EMA) of the weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


def adamw(model: nn.Module, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """AdamW without weight decay on gains, biases and embeddings; the training loop sets the learning rate."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    parameters = list(model.parameters())
    not_decayed = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights.

    The decay is min(decay, (1 + n) / (10 + n)) after n updates, so that the initial weights are soon forgotten.
    """

    def update(averages: Tensors, weights: Tensors, count: Tensor | int) -> None:
        n = int(count)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update).requires_grad_(False)
