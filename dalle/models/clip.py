"""CLIP: contrastive embeddings of images and captions (Radford et al. 2021).

It ranks the images that the prior generates for a prompt (Ramesh et al. 2021, section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dalle_kernels as dk
from dalle import config as configs
from dalle.errors import UserError
from dalle.models.blocks import ENCODER_KERNELS, TransformerBlock, bottleneck_groups, reset_transformer
from dalle.models.text import fit_text

INITIAL_SCALE, MAX_SCALE = 1 / 0.07, 100.0  # of the learned logit scale (Radford et al. 2021, section 2.5)
BATCH = 64  # images or captions per batch in `similarities`


@dataclass(frozen=True)
class CLIPConfig:
    """Configuration of a CLIP. The first convolution and the pooling after each group but the last halve the image."""

    image_size: int
    """Side of the images in pixels."""
    text_len: int
    """Text positions, including the end of text: a caption may have up to text_len - 1 tokens."""
    text_vocab: int
    """Number of text tokens."""
    widths: tuple[int, ...]
    """Channels of the image encoder's groups, first to last."""
    text_width: int
    """Channels of the text encoder, a multiple of text_heads."""
    text_layers: int
    """Residual blocks of attention and MLP in the text encoder."""
    blocks: int = 1
    """Residual blocks per group of the image encoder."""
    text_heads: int = 4
    """Attention heads of the text encoder."""
    embedding_dim: int = 128
    """Dimensions of the joint embedding space."""

    def __post_init__(self) -> None:
        """Raises UserError for invalid fields."""
        sizes = self.image_size, self.text_vocab, self.text_width, self.text_layers, self.text_heads
        if min(*sizes, self.blocks, self.embedding_dim) < 1 or not self.widths or self.text_len < 2:
            raise UserError(f"every size of a CLIP must be at least 1, and text_len at least 2, not {self}")
        if self.image_size % self.downsampling:
            raise UserError(
                f"image_size {self.image_size} is not a multiple of {self.downsampling}, "
                f"by which {len(self.widths)} groups downsample"
            )
        if bad := [width for width in self.widths if width < 4 or width % 4]:
            raise UserError(f"widths must be multiples of 4 (bottlenecks have a quarter of the width), not {bad[0]}")
        if self.text_width % self.text_heads:
            raise UserError(f"text_width {self.text_width} is not a multiple of text_heads {self.text_heads}")
        if self.text_width > 128 * self.text_heads:
            raise UserError(f"text_heads must be at least {-(-self.text_width // 128)}, not {self.text_heads}: "
                            f"a head may have at most 128 of the {self.text_width} channels")

    @property
    def residual_blocks(self) -> int:
        """Residual blocks of the image and the text encoder."""
        return len(self.widths) * self.blocks + self.text_layers

    @property
    def downsampling(self) -> int:
        """The factor by which the image encoder reduces the side."""
        return 2 ** len(self.widths)

    @property
    def end_id(self) -> int:
        """Token id of the end of text, which also serves as padding."""
        return self.text_vocab

    @classmethod
    def preset(cls, name: str) -> CLIPConfig:
        """A named configuration. "tiny" and "small" match the dVAEs and priors of these names; UserError if unknown."""
        return configs.preset(PRESETS, name)


PRESETS = {
    "tiny": CLIPConfig(32, 32, 1024, (32, 64, 128), text_width=64, text_layers=2, text_heads=2, embedding_dim=64),
    "small": CLIPConfig(64, 48, 2048, (48, 96, 192, 256), text_width=128, text_layers=2),
}


class ImageEncoder(nn.Module):
    """Images scaled to [-1, 1], [B, 3, S, S], to unit vectors, float32 [B, embedding_dim].

    The residual blocks of the dVAE's encoder, then global average pooling.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        widths = config.widths
        self.input = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.groups = bottleneck_groups([widths[0], *widths], config.blocks, ENCODER_KERNELS)
        self.norm = nn.LayerNorm(widths[-1])
        self.output = nn.Linear(widths[-1], config.embedding_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        for i, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if i else x)
        return _project(self.norm, self.output, F.relu(x).mean((2, 3)))


class TextEncoder(nn.Module):
    """Text, int64 [B, text_len], to unit vectors, float32 [B, embedding_dim].

    A causal transformer, read at the end of text.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.end_id = config.end_id
        self.embedding = nn.Embedding(config.text_vocab + 1, config.text_width)
        self.position = nn.Embedding(config.text_len, config.text_width)
        # A pattern needs a non-empty grid; no sequence is long enough to reach it.
        pattern = dk.AttentionPattern.causal(text_len=config.text_len, grid=(1, 1))
        self.layers = nn.ModuleList(
            TransformerBlock(config.text_width, config.text_heads, pattern) for _ in range(config.text_layers)
        )
        self.norm = nn.LayerNorm(config.text_width)
        self.output = nn.Linear(config.text_width, config.embedding_dim, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        ends = (text == self.end_id).int().argmax(1)
        length = int(ends.max()) + 1  # the longest caption of the batch; attention is causal, so the rest is not needed
        x = self.embedding(text[:, :length]) + self.position.weight[:length]
        for layer in self.layers:
            x = layer(x)
        return _project(self.norm, self.output, x[torch.arange(len(x), device=x.device), ends])


def _project(norm: nn.LayerNorm, linear: nn.Linear, x: Tensor) -> Tensor:
    # In float32 under autocast too: the scores of a prompt's candidates differ by little.
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(linear(norm(x.to(linear.weight.dtype))).float(), dim=-1)


class CLIP(nn.Module):
    """Image encoder, text encoder and a learned logit scale.

    Images are [B, 3, S, S], float in [0, 1] or uint8; text is int64 [B, text_len], from `pack_text`. The dot product of
    their unit embeddings, in [-1, 1], scores how well an image matches a caption.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageEncoder(config)
        self.text = TextEncoder(config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises convolutions and projections with std 1/sqrt(n_in), the transformer like the prior's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        reset_transformer(self.text.layers)
        for linear in (self.image.output, self.text.output):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def pack_text(self, captions: Sequence[Sequence[int]], truncate: bool = False) -> Tensor:
        """Token ids of captions as int64 [B, text_len]: the ids, then end-of-text tokens.

        Raises:
            UserError: a caption has more than text_len - 1 tokens and `truncate` is off, or an id is out of range.
        """
        vocab, max_tokens = self.config.text_vocab, self.config.text_len - 1
        text = torch.full((len(captions), self.config.text_len), self.config.end_id)
        for row, ids in zip(text, captions, strict=True):
            ids = fit_text(ids, vocab, max_tokens, truncate, "CLIP")
            row[: len(ids)] = ids
        return text.to(self.log_scale.device)

    def encode_text(self, text: Tensor) -> Tensor:
        """Captions, int64 [B, text_len], to unit vectors, float32 [B, embedding_dim]; UserError for other shapes."""
        if text.ndim != 2 or text.shape[1] != self.config.text_len:
            raise UserError(
                f"text must be [B, {self.config.text_len}], from pack_text, not {list(text.shape)}"
            )
        return self.text(text)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images, [B, 3, S, S], to unit vectors, float32 [B, embedding_dim]; raises UserError for other shapes."""
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise UserError(f"images must be [B, 3, {size}, {size}], not {list(images.shape)}")
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        return self.image((2 * pixels - 1).contiguous(memory_format=torch.channels_last))

    def similarities(self, images: Tensor, text: Tensor) -> Tensor:
        """Cosine similarities of every image with every caption, float32 [n, m], on the CPU.

        Args:
            images: [n, 3, S, S], on any device.
            text: captions, int64 [m, text_len], from `pack_text`, on the model's device.
        """
        image_embeddings = torch.cat([self.encode_images(batch.to(text.device)).cpu() for batch in images.split(BATCH)])
        text_embeddings = torch.cat([self.encode_text(batch).cpu() for batch in text.split(BATCH)])
        return image_embeddings @ text_embeddings.t()

    def loss(self, images: Tensor, text: Tensor, keys: Tensor | None = None) -> dict[str, Tensor]:
        """Symmetric contrastive cross-entropy over the batch (Radford et al. 2021, section 2.3).

        Rows with the same caption are not used as negatives of each other: their logits are masked out.

        Args:
            images: [B, 3, S, S].
            text: one caption per image, int64 [B, text_len].
            keys: int64 [B]; rows with the same key, such as one image with two of its captions, are not used as
                negatives of each other either.

        Returns:
            "loss": in nats, the mean of both directions, differentiable; "accuracy": the fraction of rows and columns
            whose own pair scores best; "scale": the logit scale; both detached.
        """
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(MAX_SCALE))
        scale = self.log_scale.exp()
        image_embeddings, text_embeddings = self.encode_images(images), self.encode_text(text)
        with torch.autocast(images.device.type, enabled=False):
            logits = scale * image_embeddings @ text_embeddings.t()
        same = (text[:, None] == text).all(-1)
        if keys is not None:
            same |= keys[:, None] == keys
        logits = logits.masked_fill(same.fill_diagonal_(False), -math.inf)
        targets = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2
        correct = torch.stack([logits.argmax(dim) == targets for dim in (0, 1)])
        return {"loss": loss, "accuracy": correct.float().mean(), "scale": scale.detach()}
