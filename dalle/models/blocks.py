"""Residual blocks shared by the models."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dalle_kernels as dk

ENCODER_KERNELS = (3, 3, 3, 1)  # small receptive fields next to the relaxation generalise better (App. A.1)
DECODER_KERNELS = (1, 3, 3, 3)
STORED_NAMES = {"attention.qkv.": "qkv.", "attention.out.": "attention_out."}  # module prefix -> prefix in weight files


class TransformerBlock(nn.Module):
    """Pre-norm residual block: sparse attention, then an MLP with four times the width.

    Args:
        width: channels of the residual stream.
        heads: attention heads; must divide `width` into head dimensions of at most 128.
        pattern: which tokens each token attends to.
    """

    def __init__(self, width: int, heads: int, pattern: dk.AttentionPattern) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = dk.nn.SparseAttention(width, heads, pattern)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.register_state_dict_post_hook(_to_stored_names)
        self.register_load_state_dict_pre_hook(_from_stored_names)

    def forward(self, x: Tensor, cache: dk.DecodeCache | None = None, layer: int = 0) -> Tensor:
        """[B, N, width] to the same shape. A cache, if given, is prefilled with the keys and values of `layer`."""
        return self._mlp(x + self.attention(self.attention_norm(x), cache, layer))

    def step(self, x: Tensor, cache: dk.DecodeCache, layer: int) -> Tensor:
        """Decodes one image token of every sequence against the cache, [P * C, width] to the same shape."""
        return self._mlp(x + self.attention.step(self.attention_norm(x), cache, layer))

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp_out(gelu(self.mlp_in(self.mlp_norm(x))))


def reset_transformer(blocks: nn.ModuleList) -> None:
    """Scales the initial weights that write to the residual stream by 1/sqrt(2 blocks)."""
    for block in blocks:
        for linear in (block.attention.out, block.mlp_out):  # pyrefly: ignore[missing-attribute]
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=0.02 / (2 * len(blocks)) ** 0.5)


def gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of Child et al. 2019."""
    return F.silu(1.702 * x) / 1.702


class BottleneckBlock(nn.Module):
    """Bottleneck residual block, `id(x) + gain * res(x)`: a ReLU before each convolution, no normalisation (App. A.1).

    [B, n_in, H, W] to [B, n_out, H, W]; `kernels` are the sizes of the four convolutions.
    """

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, n_out // 4, n_out // 4, n_out // 4, n_out)
        self.res_path = nn.ModuleList(
            nn.Conv2d(a, b, k, padding=k // 2) for (a, b), k in zip(pairwise(widths), kernels, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.res_path
        y = first(F.relu(x))
        for conv in rest:
            y = conv(F.relu_(y))
        return torch.add(self.id_path(x), y, alpha=self.gain)


def bottleneck_groups(widths: list[int], blocks: int, kernels: tuple[int, ...]) -> nn.ModuleList:
    """One group of `blocks` residual blocks for each pair of consecutive widths."""
    gain = 1 / (blocks * (len(widths) - 1)) ** 2
    return nn.ModuleList(
        nn.Sequential(*(BottleneckBlock(b if i else a, b, kernels, gain) for i in range(blocks)))
        for a, b in pairwise(widths)
    )


def _to_stored_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    _rename(state, {prefix + ours: prefix + stored for ours, stored in STORED_NAMES.items()})


def _from_stored_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, {prefix + stored: prefix + ours for ours, stored in STORED_NAMES.items()})


def _rename(state: dict[str, Any], prefixes: dict[str, str]) -> None:
    for name in list(state):
        for old, new in prefixes.items():
            if name.startswith(old):
                state[new + name.removeprefix(old)] = state.pop(name)
