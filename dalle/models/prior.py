"""The prior: a sparse transformer over a caption and the codes of its picture (Ramesh et al. 2021, App. B)."""

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

TEXT_WEIGHT, IMAGE_WEIGHT = 1 / 8, 7 / 8  # of the two cross-entropies (section 2.2)
IGNORE = -100  # target of a position that does not count


@dataclass(frozen=True)
class PriorConfig:
    """Size of a prior. The width of the model is `heads * head_dim`."""

    text_len: int
    """Text positions, the start token's included: a caption may have up to text_len - 1 tokens."""
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
    """Channels of a head."""
    conv_kernel: int = 11
    """Side of the window of the last, convolutional layer; odd."""

    def __post_init__(self) -> None:
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
        """Image positions: one for each code."""
        return self.grid[0] * self.grid[1]

    @property
    def start_id(self) -> int:
        """Text id of the start token, which fills position 0; as a target the same number means "end of text"."""
        return self.text_vocab

    def schedule(self) -> list[dk.AttentionPattern]:
        """A pattern for each layer: row, column, row, row, and so on, the last convolutional (App. B.1).

        Layer i = 1, 2, ..., layers - 1 is column if (i - 2) % 4 == 0, and otherwise row.
        """
        row = dk.AttentionPattern.row(text_len=self.text_len, grid=self.grid)
        column = dk.AttentionPattern.column(text_len=self.text_len, grid=self.grid)
        conv = dk.AttentionPattern.conv(text_len=self.text_len, grid=self.grid, kernel=self.conv_kernel)
        return [column if (i - 2) % 4 == 0 else row for i in range(1, self.layers)] + [conv]

    @classmethod
    def preset(cls, name: str) -> PriorConfig:
        """A named size; "tiny" and "small" go with the dVAEs of these names, "dalle-12b" is the published one."""
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
    """Autoregressive transformer over [text_len text positions, then the picture's codes in raster order].

    Position p holds its own token and predicts the one at p + 1: position 0 holds the start token, text positions
    predict text, the last text position and the image positions predict codes; all positions are fed in training and
    the last output goes unused. Text is int64 [B, text_len] as `pack_text` lays it out: unused positions hold learned
    pads, one per position, which are attended to like any token.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width, (rows, columns) = config.width, config.grid
        # Rows: the text tokens, the start token, a pad for each position.
        self.text_embedding = nn.Embedding(config.text_vocab + 1 + config.text_len, width)
        self.text_position = nn.Embedding(config.text_len, width)
        self.image_embedding = nn.Embedding(config.image_vocab, width)
        self.row_embedding = nn.Embedding(rows, width)
        self.column_embedding = nn.Embedding(columns, width)
        self.layers = nn.ModuleList(TransformerBlock(width, config.heads, pattern) for pattern in config.schedule())
        self.norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, config.text_vocab + 1)
        self.image_head = nn.Linear(width, config.image_vocab)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and embeddings ~ N(0, 0.02), those that write to the residual stream scaled by 1/sqrt(2 layers)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        reset_transformer(self.layers)

    def pack_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """Token ids of captions as int64 [B, text_len]: the start token, the ids, then each position's own pad.

        Raises:
            UserError: a caption has more than text_len - 1 tokens and `truncate` is off, or an id is out of range.
        """
        vocab, room = self.config.text_vocab, self.config.text_len - 1
        text = torch.arange(vocab + 1, vocab + 1 + self.config.text_len).repeat(len(captions), 1)
        text[:, 0] = self.config.start_id
        for row, ids in zip(text, captions, strict=True):
            ids = fit_text(ids, vocab, room, truncate, "the model")
            row[1 : 1 + len(ids)] = ids
        return text.to(self.text_embedding.weight.device)

    def forward(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits in float32: text [B, text_len - 1, text_vocab + 1], image [B, n + 1, image_vocab].

        Args:
            text: int64 [B, text_len], from `pack_text`.
            codes: the first n codes of each picture in raster order, int64 [B, n], 0 <= n <= rows * columns. Image
                logit i predicts code i; with all codes given the one after the last is left out, so n logits come.
        """
        hidden = self._run(text, codes)
        end = self.config.text_len - 1
        text_hidden, image_hidden = hidden[:, :end], hidden[:, end : end + self.config.image_len]
        return self._logits(self.text_head, text_hidden), self.image_logits(image_hidden)

    def loss(self, text: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Cross-entropies of a batch of captions [B, text_len] and all codes of their pictures [B, rows * columns].

        Each is the mean over its own tokens, in nats. The text counts a caption's tokens and the first pad after it,
        which stands for "end of text" whatever its position; further pads would teach nothing and are ignored.

        Returns:
            "loss": 1/8 text + 7/8 image, differentiable; "text", "image": detached.
        """
        if codes.shape[1] != self.config.image_len:
            raise UserError(f"a picture has {self.config.image_len} codes, not {codes.shape[1]}")
        text_logits, image_logits = self(text, codes)
        text_loss = F.cross_entropy(text_logits.flatten(0, 1), self.text_targets(text).flatten(), ignore_index=IGNORE)
        image_loss = F.cross_entropy(image_logits.flatten(0, 1), codes.flatten())
        loss = TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss
        return {"loss": loss, "text": text_loss.detach(), "image": image_loss.detach()}

    def text_targets(self, text: Tensor) -> Tensor:
        """What positions 0 to text_len - 2 should predict, int64 [B, text_len - 1]; IGNORE after the end of text."""
        targets = text[:, 1:].clamp(max=self.config.start_id)
        ended = (targets == self.config.start_id).cumsum(1)
        return targets.masked_fill(ended > 1, IGNORE)

    def prefill(self, text: Tensor, codes: Tensor, cache: dk.DecodeCache) -> Tensor:
        """Runs what precedes the first code to draw, and stores its keys and values in the cache.

        Args:
            text: int64 [P, text_len], from `pack_text`.
            codes: the given first codes of each picture, int64 [P, cache.start].
            cache: of P prompts, with a layer for each of the model's.

        Returns:
            The hidden state that predicts the next code, [P, width].
        """
        return self._run(text, codes, cache)[:, -1]

    def step(self, codes: Tensor, place: Tensor, cache: dk.DecodeCache) -> Tensor:
        """Runs one code of every picture against the cache, which goes on to the next.

        Args:
            codes: int64 [P * C, 1].
            place: where in the picture they are, int64 [1]: the cache's step.

        Returns:
            The hidden state that predicts the next code, [P * C, width].
        """
        x = self._embed_codes(codes, place)[:, 0]
        for i, layer in enumerate(self.layers):
            x = layer.step(x, cache, i)  # pyrefly: ignore[not-callable]  # a ModuleList does not say of what
        cache.advance()
        return x

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the codes, float32 [..., image_vocab], of hidden states [..., width]."""
        return self._logits(self.image_head, hidden)

    def _run(self, text: Tensor, codes: Tensor, cache: dk.DecodeCache | None = None) -> Tensor:
        """Hidden states of all text positions and the given codes, [B, text_len + n, width]."""
        config = self.config
        if text.ndim != 2 or text.shape[1] != config.text_len:
            raise UserError(f"text must be [B, {config.text_len}], as pack_text lays it out, not {list(text.shape)}")
        if codes.ndim != 2 or codes.shape[1] > config.image_len or len(codes) != len(text):
            raise UserError(f"codes must be [{len(text)}, at most {config.image_len}], not {list(codes.shape)}")
        places = torch.arange(codes.shape[1], device=codes.device)
        x = torch.cat([self.text_embedding(text) + self.text_position.weight, self._embed_codes(codes, places)], 1)
        for i, layer in enumerate(self.layers):
            x = layer(x, cache, i)
        return x

    def _embed_codes(self, codes: Tensor, places: Tensor) -> Tensor:
        """Codes [B, n] at `places` [n] of the picture, [B, n, width]."""
        columns = self.config.grid[1]
        position = self.row_embedding(places // columns) + self.column_embedding(places % columns)
        return self.image_embedding(codes) + position

    def _logits(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        # Logits in 16 bits shift the loss (App. D), so the heads stay in float32 under autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            return head(self.norm(hidden).to(head.weight.dtype)).float()
