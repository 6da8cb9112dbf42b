"""VQGAN (Esser et al. 2021), the image tokenizer of ruDALL-E and minDALL-E, for use in place of the dVAE.

It is for converted weights: its adversarial training is not part of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from dalle import config as configs
from dalle.errors import UserError
from dalle.models.dvae import MAX_IMAGE_SIZE, DiscreteVAE, check_codes, to_pixels

NORM_GROUPS = 32  # of every group normalisation


@dataclass(frozen=True)
class VQGANConfig:
    """Configuration of a VQGAN. Every stage but the last halves the sides; attention is in the last one."""

    image_size: int
    """Side of the images in pixels."""
    vocab: int
    """Number of codes."""
    widths: tuple[int, ...]
    """Channels of the encoder's stages, first to last; the decoder has them reversed."""
    blocks: int = 2
    """Residual blocks per stage of the encoder; the decoder has one more."""
    codebook_dim: int = 256
    """Dimensions of a code's embedding, and channels between encoder and codebook."""

    def __post_init__(self) -> None:
        """Raises UserError for invalid fields."""
        if min(self.image_size, self.vocab, self.blocks, self.codebook_dim) < 1 or not self.widths:
            raise UserError(f"every size of a VQGAN must be at least 1, not {self}")
        configs.check(self, f"be at most {MAX_IMAGE_SIZE}", image_size=self.image_size <= MAX_IMAGE_SIZE)
        configs.check(
            self, f"be a multiple of {self.downsampling}", image_size=self.image_size % self.downsampling == 0
        )
        if bad := [width for width in self.widths if width < 1 or width % NORM_GROUPS]:
            raise UserError(f"widths must be multiples of {NORM_GROUPS}, not {bad[0]}")

    @property
    def residual_blocks(self) -> int:
        """Residual blocks of encoder and decoder."""
        return len(self.widths) * (2 * self.blocks + 1)

    @property
    def downsampling(self) -> int:
        """Side of the pixels that one code covers."""
        return 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """Side of the grid of codes."""
        return self.image_size // self.downsampling

    @classmethod
    def preset(cls, name: str) -> VQGANConfig:
        """A named configuration, "rudalle" or "mindalle"; UserError for an unknown name."""
        return configs.preset(PRESETS, name)


PRESETS = {
    "rudalle": VQGANConfig(256, 8192, (128, 128, 256, 512)),
    "mindalle": VQGANConfig(256, 16384, (128, 128, 256, 256, 512)),
}


class ResidualBlock(nn.Module):
    """Two convolutions, each after a group normalisation: [B, n_in, H, W] to [B, n_out, H, W]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = _norm(n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions, [B, width, H, W] to the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(y)


class Stage(nn.Module):
    """Residual blocks of one resolution, each with attention if asked for; `scale` leads to the next resolution."""

    def __init__(self, n_in: int, n_out: int, blocks: int, attention: bool, scale: nn.Conv2d | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(n_out if i else n_in, n_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(n_out) if attention else nn.Identity() for _ in range(blocks))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Without `scale`, which differs between encoder and decoder."""
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        return x


class Middle(nn.Module):
    """The blocks at the lowest resolution, between the stages and the codes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images in [-1, 1], [B, 3, S, S], to logits over the codes, [B, vocab, S/f, S/f]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, last, dim = config.widths, len(config.widths) - 1, config.codebook_dim
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Stage(a, b, config.blocks, i == last, nn.Conv2d(b, b, 3, stride=2) if i < last else None)
            for i, (a, b) in enumerate(pairwise((widths[0], *widths)))
        )
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), nn.Conv2d(widths[-1], dim, 3, padding=1)
        self.quant_conv = nn.Conv2d(dim, dim, 1)
        self.output = nn.Conv2d(dim, config.vocab, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
            if stage.scale is not None:
                x = stage.scale(F.pad(x, (0, 1, 0, 1)))  # pyrefly: ignore[not-callable]
        return self.output(self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x))))))


class Decoder(nn.Module):
    """Codes, int64 [B, h, w], to images, [B, 3, H, W], of which [-1, 1] is the range of pixels."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, last, dim = config.widths, len(config.widths) - 1, config.codebook_dim
        self.embedding = nn.Embedding(config.vocab, dim)
        self.post_quant_conv = nn.Conv2d(dim, dim, 1)
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(  # from the highest resolution down, although the lowest runs first
            Stage(a, b, config.blocks + 1, i == last, nn.Conv2d(b, b, 3, padding=1) if i else None)
            for i, (b, a) in enumerate(pairwise((*widths, widths[-1])))
        )
        self.norm_out, self.conv_out = _norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.post_quant_conv(self.embedding(codes).permute(0, 3, 1, 2))
        x = self.mid(self.conv_in(x))
        for stage in reversed(self.up):
            x = stage(x)
            if stage.scale is not None:
                x = stage.scale(F.interpolate(x, scale_factor=2, mode="nearest"))  # pyrefly: ignore[not-callable]
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Encoder and decoder, with the interface of `DiscreteVAE` except for the loss.

    The nearest codebook vector e of an encoding z maximises 2 e·z - |e|², which is linear in z: a codebook is the last
    1x1 convolution of the encoder, as the logits of a Gumbel-softmax VQGAN are.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """Images to logits over the codes, [B, vocab, h, w]."""
        return self.encoder(2 * to_pixels(images, self.config.downsampling) - 1)

    def codes(self, images: Tensor) -> Tensor:
        """Images to their codes, int64 [B, h, w], without noise."""
        return self.encode(images).argmax(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes, int64 [B, h, w], to images, float32 [B, 3, H, W] in [0, 1]."""
        check_codes(codes)
        return ((self.decoder(codes).float() + 1) / 2).clamp(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encodes images as codes and decodes them, float32 [B, 3, H, W] in [0, 1]."""
        return self.decode(self.codes(images))


ImageTokenizer = DiscreteVAE | VQGAN


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, width, eps=1e-6)
