"""The prior: a sparse transformer over the tokens of a caption and the codes of its image.

Ramesh et al. 2021, section 2.2 and App. B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dalle_kernels as dk
from dalle import config as configs
from dalle.errors import UserError
from dalle.models.blocks import TransformerBlock, reset_transformer
from dalle.models.text import fit_text

TEXT_WEIGHT, IMAGE_WEIGHT = 1 / 8, 7 / 8  # weights of the two cross-entropies (section 2.2)
IGNORE = -100  # target of positions that are ignored in the loss


@dataclass(frozen=True)
class PriorConfig:
    """Configuration of a prior. The width of the model is `heads * head_dim`."""

    text_len: int
    """Text positions, including the start token: a caption may have up to text_len - 1 tokens."""
    text_vocab: int
    """Number of text tokens."""
    grid: tuple[int, int]
    """Rows and columns of image codes."""
    image_vocab: int
    """Number of image codes."""
    layers: int
    """Residual blocks of attention and MLP."""
    heads: int
    """Attention heads."""
    head_dim: int = 64
    """Channels per head, at most 128."""
    conv_kernel: int = 11
    """Kernel size of the last, convolutional layer; odd."""

    def __post_init__(self) -> None:
        """Raises UserError for invalid fields."""
        if min(self.text_vocab, *self.grid, self.image_vocab, self.layers, self.heads, self.head_dim) < 1:
            raise UserError(f"every size of a prior must be at least 1, not {self}")
        if len(self.grid) != 2 or self.text_len < 2:
            raise UserError(f"a prior needs a grid of two sides and text_len >= 2, not {self.grid}, {self.text_len}")
        if self.conv_kernel < 1 or self.conv_kernel % 2 == 0:
            raise UserError(f"conv_kernel must be odd, not {self.conv_kernel}")
        configs.check(self, "be at most 128", head_dim=self.head_dim <= 128)

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.heads * self.head_dim

    @property
    def image_len(self) -> int:
        """Image positions, one per code."""
        return self.grid[0] * self.grid[1]

    @property
    def residual_blocks(self) -> int:
        """Residual blocks of the model."""
        return self.layers

    @property
    def start_id(self) -> int:
        """Token id of the start token at position 0; as a target, the same id means "end of text"."""
        return self.text_vocab

    def schedule(self) -> list[dk.AttentionPattern]:
        """The attention pattern of each layer: row, column, row, row, repeated, and convolutional last (App. B.1).

        Layer i = 1, 2, ..., layers - 1 is column if (i - 2) % 4 == 0, and otherwise row.
        """
        row = dk.AttentionPattern.row(text_len=self.text_len, grid=self.grid)
        column = dk.AttentionPattern.column(text_len=self.text_len, grid=self.grid)
        conv = dk.AttentionPattern.conv(text_len=self.text_len, grid=self.grid, kernel=self.conv_kernel)
        return [column if (i - 2) % 4 == 0 else row for i in range(1, self.layers)] + [conv]

    @classmethod
    def preset(cls, name: str) -> PriorConfig:
        """A named configuration: "tiny" and "small" match the dVAEs of these names, "dalle-12b" is the published one.

        Raises UserError for an unknown name.
        """
        return configs.preset(PRESETS, name)


PRESETS = {
    "tiny": PriorConfig(32, 1024, (8, 8), 512, layers=6, heads=6, head_dim=32, conv_kernel=5),
    "small": PriorConfig(48, 2048, (16, 16), 1024, layers=12, heads=4, conv_kernel=7),
    "medium": PriorConfig(128, 16384, (16, 16), 4096, layers=16, heads=8, conv_kernel=7),
    "dalle-2.8b": PriorConfig(256, 16384, (32, 32), 8192, layers=64, heads=30),
    "dalle-5.6b": PriorConfig(256, 16384, (32, 32), 8192, layers=64, heads=42),
    "dalle-12b": PriorConfig(256, 16384, (32, 32), 8192, layers=64, heads=62),
}


class Prior(nn.Module):
    """Autoregressive transformer over text_len text tokens followed by the image's codes in raster order.

    Position p holds token p and predicts token p + 1. Position 0 holds the start token. Text positions predict text;
    the last text position and the image positions predict codes. In training all positions are fed, and the last output
    is not used. Text is int64 [B, text_len], from `pack_text`. Unused text positions hold learned padding tokens, one
    per position, which are attended to like any token (section 2.2).
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width, (rows, columns) = config.width, config.grid
        # Rows: the text tokens, the start token, one padding token per position.
        self.text_embedding = nn.Embedding(config.text_vocab + 1 + config.text_len, width)
        self.text_position = nn.Embedding(config.text_len, width)
        self.image_embedding = nn.Embedding(config.image_vocab, width)
        self.row_embedding = nn.Embedding(rows, width)
        self.column_embedding = nn.Embedding(columns, width)
        self.layers = nn.ModuleList(self.block(pattern) for pattern in config.schedule())
        self.norm: nn.Module = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, config.text_vocab + 1)
        self.image_head = nn.Linear(width, config.image_vocab)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises weights with std 0.02, scaled by 1/sqrt(2 layers) where they write to the residual stream."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        reset_transformer(self.layers)

    def block(self, pattern: dk.AttentionPattern) -> TransformerBlock:
        """A new residual block with the attention of `pattern`."""
        return TransformerBlock(self.config.width, self.config.heads, pattern)

    def pack_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """Token ids of captions as int64 [B, text_len]: the start token, the ids, then each position's padding token.

        Raises:
            UserError: a caption has more than text_len - 1 tokens and `truncate` is off, or an id is out of range.
        """
        vocab, max_tokens = self.config.text_vocab, self.config.text_len - 1
        text = torch.arange(vocab + 1, vocab + 1 + self.config.text_len).repeat(len(captions), 1)
        text[:, 0] = self.config.start_id
        for row, ids in zip(text, captions, strict=True):
            ids = fit_text(ids, vocab, max_tokens, truncate, "the model")
            row[1 : 1 + len(ids)] = ids
        return text.to(self.text_embedding.weight.device)

    def forward(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits in float32: text [B, text_len - 1, text_vocab + 1], image [B, n + 1, image_vocab].

        Args:
            text: int64 [B, text_len], from `pack_text`.
            codes: the first n codes of each image in raster order, int64 [B, n], 0 <= n <= rows * columns. Image logit
                i predicts code i. If all codes are given, there are n image logits, because none follows the last.

        Raises:
            UserError: a shape is wrong.
        """
        hidden = self._run(text, codes)
        end = self.config.text_len - 1
        text_hidden, image_hidden = hidden[:, :end], hidden[:, end : end + self.config.image_len]
        return self._logits(self.text_head, text_hidden), self.image_logits(image_hidden)

    def loss(self, text: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Cross-entropies of captions, int64 [B, text_len], and all codes of their images, int64 [B, rows * columns].

        Each is a mean over its own tokens, in nats. The text loss counts a caption's tokens and the first padding
        token, whose target is "end of text" at every position. Further padding carries no information and is ignored.

        Returns:
            "loss": 1/8 text + 7/8 image, differentiable; "text", "image": detached.
        """
        if codes.shape[1] != self.config.image_len:
            raise UserError(f"an image has {self.config.image_len} codes, not {codes.shape[1]}")
        text_logits, image_logits = self(text, codes)
        text_loss = F.cross_entropy(text_logits.flatten(0, 1), self.text_targets(text).flatten(), ignore_index=IGNORE)
        image_loss = F.cross_entropy(image_logits.flatten(0, 1), codes.flatten())
        loss = TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss
        return {"loss": loss, "text": text_loss.detach(), "image": image_loss.detach()}

    def text_targets(self, text: Tensor) -> Tensor:
        """Targets of positions 0 to text_len - 2, int64 [B, text_len - 1]; IGNORE after the end of text."""
        targets = text[:, 1:].clamp(max=self.config.start_id)
        ended = (targets == self.config.start_id).cumsum(1)
        return targets.masked_fill(ended > 1, IGNORE)

    def prefill(self, text: Tensor, codes: Tensor, cache: dk.DecodeCache) -> Tensor:
        """Runs the text and the given first codes, and stores their keys and values in the cache.

        Args:
            text: int64 [P, text_len], from `pack_text`.
            codes: the first codes of each image, int64 [P, cache.start].
            cache: a cache for P prompts with the model's layers.

        Returns:
            The hidden state that predicts the next code, [P, width].
        """
        return self._run(text, codes, cache)[:, -1]

    def step(self, codes: Tensor, position: Tensor, cache: dk.DecodeCache) -> Tensor:
        """Decodes one step: runs one code of every image against the cache, and advances the cache.

        Args:
            codes: int64 [P * C, 1].
            position: their raster position in the image, int64 [1]: the cache's step.

        Returns:
            The hidden state that predicts the next code, [P * C, width].
        """
        x = self._embed_codes(codes, position)[:, 0]
        for i, layer in enumerate(self.layers):
            x = layer.step(x, cache, i)  # pyrefly: ignore[not-callable]  # a ModuleList does not declare its type
        cache.advance()
        return x

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the codes, float32 [..., image_vocab], of hidden states [..., width]."""
        return self._logits(self.image_head, hidden)

    def _run(self, text: Tensor, codes: Tensor, cache: dk.DecodeCache | None = None) -> Tensor:
        """Hidden states of all text positions and the given codes, [B, text_len + n, width]."""
        config = self.config
        if text.ndim != 2 or text.shape[1] != config.text_len:
            raise UserError(f"text must be [B, {config.text_len}], from pack_text, not {list(text.shape)}")
        if codes.ndim != 2 or codes.shape[1] > config.image_len or codes.shape[0] != text.shape[0]:
            raise UserError(f"codes must be [{text.shape[0]}, at most {config.image_len}], not {list(codes.shape)}")
        positions = torch.arange(codes.shape[1], device=codes.device)
        x = torch.cat([self.text_embedding(text) + self.text_position.weight, self._embed_codes(codes, positions)], 1)
        for i, layer in enumerate(self.layers):
            x = layer(x, cache, i)
        return x

    def _embed_codes(self, codes: Tensor, positions: Tensor) -> Tensor:
        """Embeds codes [B, n] at raster positions [n], [B, n, width]."""
        columns = self.config.grid[1]
        position_embedding = self.row_embedding(positions // columns) + self.column_embedding(positions % columns)
        return self.image_embedding(codes) + position_embedding

    def _logits(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        # 16-bit logits bias the loss (App. D), so the heads stay in float32 under autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            return head(self.norm(hidden).to(head.weight.dtype)).float()
