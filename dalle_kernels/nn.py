"""nn.Module wrappers."""

from __future__ import annotations

import torch
from torch import nn

from .decode_attention import decode_attention
from .decode_cache import DecodeCache
from .patterns import AttentionPattern
from .sparse_attention import sparse_attention


class SparseAttention(nn.Module):
    """Multi-head self-attention over a static sparse pattern, with query-key-value and output projections.

    Args:
        dim: width of the input and output.
        heads: number of heads; must divide `dim` into head dims of at most 128.
        pattern: which token attends to which.
        bias: whether the projections have biases.

    With a `DecodeCache`, image tokens are generated one at a time: `forward` stores the keys and values of the prefix,
    and `step` processes the next token.

    Raises:
        ValueError: `heads` does not divide `dim` into head dims of at most 128.
    """

    def __init__(self, dim: int, heads: int, pattern: AttentionPattern, *, bias: bool = True) -> None:
        super().__init__()
        if heads < 1 or dim % heads or dim // heads > 128:
            raise ValueError(f"heads must divide dim into head dims of at most 128; got dim={dim}, heads={heads}")
        self.heads, self.pattern = heads, pattern
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: torch.Tensor, cache: DecodeCache | None = None, layer: int = 0) -> torch.Tensor:
        """Self-attention: x [B, N, dim] with N <= pattern.seq_len -> [B, N, dim]. If a cache is given, the keys and
        values of x become the next N tokens of the prefix of its `layer` (B prompts, text_len + start tokens).

        Raises:
            ValueError: the cache holds some of the given image tokens, and so no longer all tokens before x.
        """
        q, k, v = self._heads(x)
        if cache is not None:
            prefix = _prefix(cache, layer, k, v)
            cache.prefill(layer, k, v)
            k, v = prefix
        return self.out(sparse_attention(q, k, v, self.pattern).transpose(1, 2).flatten(2))

    def step(self, x: torch.Tensor, cache: DecodeCache, layer: int = 0) -> torch.Tensor:
        """Attention of one new token per sequence over `layer` of the cache: x [P * C, dim] -> [P * C, dim]. The
        cache stays at its step until `cache.advance()`.
        """
        q, k, v = (t[:, :, 0] for t in self._heads(x[:, None]))
        return self.out(decode_attention(q, k, v, cache, layer).flatten(1))

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each [B, heads, N, D]."""
        if x.ndim != 3 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(f"x must have the shape [B, N, {self.qkv.in_features}]; got {list(x.shape)}")
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, pattern={self.pattern!r}"


def _prefix(
    cache: DecodeCache, layer: int, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of a layer's prefix, up to and with the new tokens' k and v."""
    first = cache.next_position(layer)
    if first == 0:
        return k, v
    if first > cache.text_len:
        raise ValueError(
            f"x must hold all {cache.start} given image tokens, as the cache does not keep all of them; layer {layer} "
            f"already holds {first - cache.text_len}"
        )
    stored = cache.layer(layer)
    return torch.cat([stored.prefix_k[:, :, :first], k], 2), torch.cat([stored.prefix_v[:, :, :first], v], 2)
