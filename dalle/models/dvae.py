"""The discrete variational autoencoder, between images and grids of codes (Ramesh et al. 2021, App. A)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dalle_kernels as dk
from dalle import config as configs
from dalle.errors import UserError
from dalle.models.blocks import DECODER_KERNELS, ENCODER_KERNELS, bottleneck_groups

MAX_IMAGE_SIZE = 8192  # no weight depends on it, so that nothing else bounds what a file may ask for
PIXEL_EPS = 0.1  # pixels are mapped to (eps, 1 - eps), where the logit-Laplace density is well behaved (App. A.3)


@dataclass(frozen=True)
class DiscreteVAEConfig:
    """Configuration of a dVAE. Pooling follows each group but the last: a code covers 2^(groups - 1) pixels a side."""

    image_size: int
    """Side of the images in pixels."""
    vocab: int
    """Number of codes."""
    widths: tuple[int, ...]
    """Output channels of the encoder's groups, first to last; the decoder has them reversed."""
    blocks: int = 2
    """Residual blocks per group."""
    decoder_widths: tuple[int, ...] | None = None
    """Widths of the decoder, in the encoder's order; by default those of the encoder."""
    decoder_blocks: int | None = None
    """Residual blocks per group of the decoder; by default as in the encoder."""
    codebook_dim: int = 128
    """Dimensions of a code's embedding: the output channels of the decoder's first 1x1 convolution."""
    codebook_std: float | None = None
    """Standard deviation of the initial embeddings; by default 1/sqrt(vocab) as published, 1.0 learns colour sooner."""

    def __post_init__(self) -> None:
        """Raises UserError for invalid fields."""
        decoder_widths, decoder_blocks = self.decoder_size
        if min(self.image_size, self.vocab, self.blocks, decoder_blocks, self.codebook_dim) < 1 or not self.widths:
            raise UserError(f"every size of a dVAE must be at least 1, not {self}")
        configs.check(self, f"be at most {MAX_IMAGE_SIZE}", image_size=self.image_size <= MAX_IMAGE_SIZE)
        configs.check(
            self, "be positive and finite", codebook_std=self.codebook_std is None or 0 < self.codebook_std < math.inf
        )
        if self.image_size % self.downsampling:
            raise UserError(
                f"image_size {self.image_size} is not a multiple of {self.downsampling}, "
                f"by which {len(self.widths)} groups downsample"
            )
        if len(decoder_widths) != len(self.widths):
            raise UserError(f"decoder_widths must have {len(self.widths)} entries, not {len(decoder_widths)}")
        if bad := [width for width in self.widths + decoder_widths if width < 4 or width % 4]:
            raise UserError(f"widths must be multiples of 4 (bottlenecks have a quarter of the width), not {bad[0]}")

    @property
    def decoder_size(self) -> tuple[tuple[int, ...], int]:
        """Widths, and blocks per group, of the decoder."""
        return (
            self.widths if self.decoder_widths is None else self.decoder_widths,
            self.blocks if self.decoder_blocks is None else self.decoder_blocks,
        )

    @property
    def residual_blocks(self) -> int:
        """Residual blocks of encoder and decoder."""
        return len(self.widths) * (self.blocks + self.decoder_size[1])

    @property
    def downsampling(self) -> int:
        """Side of the pixels that one code covers."""
        return 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """Side of the grid of codes."""
        return self.image_size // self.downsampling

    @classmethod
    def preset(cls, name: str) -> DiscreteVAEConfig:
        """A named configuration: "tiny" and "small" train in minutes on a CPU, "dalle" is the published one.

        Raises UserError for an unknown name.
        """
        return configs.preset(PRESETS, name)


PRESETS = {
    "tiny": DiscreteVAEConfig(32, 512, (32, 64, 128), blocks=1, codebook_dim=64, codebook_std=1.0),
    "small": DiscreteVAEConfig(64, 1024, (32, 64, 128), blocks=2, codebook_dim=128, codebook_std=1.0),
    "medium": DiscreteVAEConfig(128, 4096, (128, 256, 512, 1024), blocks=2, codebook_std=1.0),
    "dalle": DiscreteVAEConfig(256, 8192, (256, 512, 1024, 2048), blocks=2),
}


class Encoder(nn.Module):
    """Images mapped to (eps, 1 - eps), [B, 3, S, S], to float32 logits over the codes, [B, vocab, S/f, S/f]."""

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        self.input = nn.Conv2d(3, config.widths[0], 7, padding=3)
        self.groups = bottleneck_groups([config.widths[0], *config.widths], config.blocks, ENCODER_KERNELS)
        self.output = nn.Conv2d(config.widths[-1], config.vocab, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        for i, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if i else x)
        with torch.autocast(x.device.type, enabled=False):
            return self.output(F.relu(x).to(self.output.weight.dtype))


class Decoder(nn.Module):
    """Codes to the parameters of the logit-Laplace likelihood, [B, 6, H, W]: three channels of mu, three of ln b."""

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        widths, blocks = config.decoder_size
        self.input = nn.Conv2d(config.vocab, config.codebook_dim, 1)
        self.groups = bottleneck_groups([config.codebook_dim, *reversed(widths)], blocks, DECODER_KERNELS)
        self.output = nn.Conv2d(widths[0], 6, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Decodes a distribution over codes at every position, [B, vocab, h, w]."""
        with torch.autocast(z.device.type, enabled=False):
            x = self.input(z)
        return self._decode(x)

    def from_codes(self, codes: Tensor) -> Tensor:
        """Decodes codes, int64 [B, h, w]. The 1x1 convolution of one-hot vectors is an embedding lookup."""
        x = F.embedding(codes, self.input.weight[:, :, 0, 0].t())
        x = x + self.input.bias  # pyrefly: ignore[unsupported-operation]  # it has one
        return self._decode(x.permute(0, 3, 1, 2))

    def _decode(self, x: Tensor) -> Tensor:
        for i, group in enumerate(self.groups):
            x = group(F.interpolate(x, scale_factor=2, mode="nearest") if i else x)
        return self.output(F.relu(x))


class DiscreteVAE(nn.Module):
    """Encoder, Gumbel-softmax relaxation and decoder.

    Images are [B, 3, H, W], float in [0, 1] or uint8; codes are int64 [B, h, w] in [0, vocab). H and W may differ from
    `config.image_size`, but must be multiples of `config.downsampling`; other shapes raise UserError.
    """

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises weights with std 1/sqrt(n_in k^2), biases with 0 (App. A.1), the codebook with codebook_std."""
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
                nn.init.zeros_(conv.bias)  # pyrefly: ignore[bad-argument-type]  # it has one
        if self.config.codebook_std is not None:
            nn.init.normal_(self.decoder.input.weight, std=self.config.codebook_std)

    def encode(self, images: Tensor) -> Tensor:
        """Images to float32 logits over the codes, [B, vocab, h, w]."""
        return self.encoder(self.targets(images))

    def codes(self, images: Tensor) -> Tensor:
        """Images to their most likely codes, int64 [B, h, w], without noise, as used to train the prior (App. B)."""
        return self.encode(images).argmax(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes, int64 [B, h, w], to images, float32 [B, 3, H, W] in [0, 1]."""
        check_codes(codes)
        mu = self.decoder.from_codes(codes)[:, :3]
        return from_range(mu.float().sigmoid())

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encodes images as codes and decodes them, float32 [B, 3, H, W] in [0, 1]."""
        return self.decode(self.codes(images))

    def loss(self, images: Tensor, tau: float, beta: float, seed: int | Tensor | None = None) -> dict[str, Tensor]:
        """The relaxed evidence lower bound of a batch, negated and normalised as published (App. A.2, A.3).

        Args:
            images: [B, 3, H, W].
            tau: temperature of the relaxation, > 0.
            beta: weight of the KL term.
            seed: seed of the Gumbel noise; None takes a random one.

        Returns:
            "loss": (sum of NLL + beta * sum of KL) / (H * W * 3), mean over the batch, differentiable;
            "nll": negative log-likelihood, nats per colour value, and "kl": KL of the unrelaxed posterior to the
            uniform distribution, nats per position, both detached.
        """
        x = self.targets(images)
        z, kl = dk.gumbel_softmax(self.encoder(x), tau, dim=1, seed=seed, return_kl=True)
        nll = logit_laplace_nll(x, self.decoder(z).float()).mean()
        kl = kl.mean()
        values_per_position = x[0].numel() / z[0, 0].numel()
        return {"loss": nll + beta * kl / values_per_position, "nll": nll.detach(), "kl": kl.detach()}

    def targets(self, images: Tensor) -> Tensor:
        """Images mapped to [eps, 1 - eps], float32: the encoder's input and the target of the likelihood."""
        return to_range(to_pixels(images, self.config.downsampling))


def check_codes(codes: Tensor) -> None:
    """Raises UserError unless codes are int64 [B, h, w]."""
    if codes.ndim != 3 or codes.dtype != torch.int64:
        raise UserError(f"codes must be int64 [B, h, w], not {codes.dtype} {list(codes.shape)}")


def to_pixels(images: Tensor, factor: int) -> Tensor:
    """Images, [B, 3, H, W], uint8 or float in [0, 1], as float in [0, 1], channels last.

    Raises UserError unless the sides are multiples of `factor`.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise UserError(f"images must be [B, 3, H, W] with sides a multiple of {factor}, not {list(images.shape)}")
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    return pixels.contiguous(memory_format=torch.channels_last)


def to_range(pixels: Tensor) -> Tensor:
    """Maps [0, 1] to [eps, 1 - eps], any shape."""
    return (1 - 2 * PIXEL_EPS) * pixels + PIXEL_EPS


def from_range(x: Tensor) -> Tensor:
    """The inverse of `to_range`, clamped to [0, 1]."""
    return ((x - PIXEL_EPS) / (1 - 2 * PIXEL_EPS)).clamp(0, 1)


def logit_laplace_nll(x: Tensor, stats: Tensor) -> Tensor:
    """Negative log-density of x in (0, 1), [B, 3, H, W], under stats [B, 6, H, W] = (mu, ln b), in nats per value.

    The density is exp(-|logit(x) - mu| / b) / (2 b x (1 - x)) (App. A.3): the sigmoid of a Laplace variable. Unlike a
    Laplace or Gaussian density, it has no mass outside the range of pixels.
    """
    mu, ln_b = stats.chunk(2, dim=1)
    return (torch.logit(x) - mu).abs() * torch.exp(-ln_b) + ln_b + torch.log(2 * x * (1 - x))
