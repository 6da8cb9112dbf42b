"""Priors that differ from the published one, those of ruDALL-E and minDALL-E: what converted weights need."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dalle_kernels as dk
from dalle import config as configs
from dalle.errors import UserError
from dalle.models.blocks import TransformerBlock
from dalle.models.prior import IGNORE, Prior, PriorConfig
from dalle.models.text import fit_text

ACTIVATIONS = {"gelu": F.gelu, "gelu-tanh": functools.partial(F.gelu, approximate="tanh")}
MAX_MASK = 8192  # tokens, for patterns that are made from a mask
ATTENTION = ("clip", "torus", "causal")


@dataclass(frozen=True)
class VariantPriorConfig(PriorConfig):
    """Configuration of a `VariantPrior`; the defaults are those of ruDALL-E's third version.

    Text is `prefix`, a caption's tokens, `suffix`; there is no start token besides.
    """

    attention: Literal["clip", "torus", "causal"] = "clip"
    """As published, except that the convolutional layer does not wrap around ("clip") or wraps in both directions in an
    image that begins with the last text token ("torus", ruDALL-E's second version); or dense in every layer ("causal",
    minDALL-E)."""
    activation: Literal["gelu", "gelu-tanh"] = "gelu-tanh"
    """Activation of the MLPs: the exact GELU, or its approximation by a tanh."""
    sandwich: bool = True
    """Normalise the output of attention and MLP too, and the last hidden state twice (Ding et al. 2021)."""
    raster_positions: bool = False
    """One position embedding per image token, in place of the sum of one per row and one per column."""
    prefix: tuple[int, ...] = (2,)
    """Text tokens before those of a caption."""
    suffix: tuple[int, ...] = (3,)
    """Text tokens after those of a caption."""

    def __post_init__(self) -> None:
        """Raises UserError for invalid fields."""
        super().__post_init__()
        configs.check(self, f"be one of {', '.join(ATTENTION)}", attention=self.attention in ATTENTION)
        configs.check(self, f"be one of {', '.join(ACTIVATIONS)}", activation=self.activation in ACTIVATIONS)
        for name in ("prefix", "suffix"):
            valid = all(0 <= i < self.text_vocab for i in getattr(self, name))
            configs.check(self, f"be of ids in [0, {self.text_vocab})", **{name: valid})
        tokens = self.text_len + self.image_len
        if self.attention == "torus" and tokens > MAX_MASK:
            raise UserError(f"a torus may have at most {MAX_MASK} tokens of text and image, not {tokens}")
        if self.max_tokens < 1:
            raise UserError(f"text_len {self.text_len} leaves no room for a caption between prefix and suffix")

    @property
    def max_tokens(self) -> int:
        """Tokens that a caption may have."""
        return self.text_len - len(self.prefix) - len(self.suffix)

    def schedule(self) -> list[dk.AttentionPattern]:
        """The attention pattern of each layer."""
        text_len = self.text_len - (self.attention == "torus")
        if self.attention == "causal":
            return [dk.AttentionPattern.causal(text_len=text_len, grid=self.grid)] * self.layers
        *layers, _ = super().schedule()
        conv = dk.AttentionPattern.conv(text_len, self.grid, kernel=self.conv_kernel, edge=self.attention)
        if self.attention == "clip":
            return [*layers, conv]
        earlier = {name: getattr(dk.AttentionPattern, name)(text_len, self.grid) for name in ("row", "column")}
        return [_one_later(earlier[layer.name]) for layer in layers] + [_one_later(conv)]

    @classmethod
    def preset(cls, name: str) -> VariantPriorConfig:
        """A named configuration, "malevich", "kandinsky" or "mindalle"; UserError for an unknown name."""
        return configs.preset(PRESETS, name)


PRESETS = {
    "malevich": VariantPriorConfig(128, 16384, (32, 32), 8192, layers=24, heads=16, head_dim=128),
    "kandinsky": VariantPriorConfig(128, 16384, (32, 32), 8192, layers=64, heads=60),
    "mindalle": VariantPriorConfig(
        64, 16384, (16, 16), 16384, layers=42, heads=24, attention="causal", activation="gelu", sandwich=False,
        raster_positions=True, prefix=(), suffix=(),
    ),
}  # fmt: skip


@functools.cache
def _one_later(pattern: dk.AttentionPattern) -> dk.AttentionPattern:
    """The pattern with its text longer by the first image token, and a last image token after it.

    The last image token attends to itself only: in training it is fed, but nothing follows it.
    """
    tokens = pattern.seq_len
    with torch.device("cpu"):  # whichever device the model is made on
        mask = torch.eye(tokens + 1, dtype=torch.bool)
        mask[:tokens, :tokens] = pattern.dense()
        order = [*pattern.order().tolist(), tokens]
        return dk.AttentionPattern.from_mask(mask, text_len=pattern.text_len + 1, order=order)


class VariantBlock(TransformerBlock):
    """A `TransformerBlock` with another activation and, for a sandwich, normalised outputs."""

    def __init__(
        self, width: int, heads: int, pattern: dk.AttentionPattern, *, activation: str, sandwich: bool
    ) -> None:
        super().__init__(width, heads, pattern)
        self.activation = ACTIVATIONS[activation]
        self.attention_out_norm, self.mlp_out_norm = (
            nn.LayerNorm(width) if sandwich else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, cache: dk.DecodeCache | None = None, layer: int = 0) -> Tensor:
        """See `TransformerBlock.forward`."""
        return self._mlp(x + self.attention_out_norm(self.attention(self.attention_norm(x), cache, layer)))

    def step(self, x: Tensor, cache: dk.DecodeCache, layer: int) -> Tensor:
        """See `TransformerBlock.step`."""
        return self._mlp(x + self.attention_out_norm(self.attention.step(self.attention_norm(x), cache, layer)))

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp_out_norm(self.mlp_out(self.activation(self.mlp_in(self.mlp_norm(x)))))


class VariantPrior(Prior):
    """A `Prior` with the options of `VariantPriorConfig`."""

    config: VariantPriorConfig  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(self, config: VariantPriorConfig) -> None:
        super().__init__(config)
        if config.sandwich:
            self.norm = nn.Sequential(self.norm, nn.LayerNorm(config.width))
        if config.raster_positions:
            del self.row_embedding, self.column_embedding
            self.image_position = nn.Embedding(config.image_len, config.width)
            nn.init.normal_(self.image_position.weight, std=0.02)

    def block(self, pattern: dk.AttentionPattern) -> TransformerBlock:
        """See `Prior.block`."""
        config = self.config
        return VariantBlock(
            config.width, config.heads, pattern, activation=config.activation, sandwich=config.sandwich
        )

    def pack_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """Token ids of captions as int64 [B, text_len]: prefix, ids, suffix, then each position's padding token.

        Raises:
            UserError: a caption has too many tokens and `truncate` is off, or an id is out of range.
        """
        config = self.config
        text = torch.arange(config.text_vocab + 1, config.text_vocab + 1 + config.text_len).repeat(len(captions), 1)
        for row, ids in zip(text, captions, strict=True):
            ids = fit_text(ids, config.text_vocab, config.max_tokens, truncate, "the model")
            ids = torch.tensor([*config.prefix, *ids.tolist(), *config.suffix])
            row[: len(ids)] = ids
        return text.to(self.text_embedding.weight.device)

    def text_targets(self, text: Tensor) -> Tensor:
        """See `Prior.text_targets`. A suffix ends the text itself, so that no padding is predicted after it."""
        targets = super().text_targets(text)
        return targets.masked_fill(targets == self.config.start_id, IGNORE) if self.config.suffix else targets

    def _embed_codes(self, codes: Tensor, positions: Tensor) -> Tensor:
        if not self.config.raster_positions:
            return super()._embed_codes(codes, positions)
        return self.image_embedding(codes) + self.image_position(positions)
