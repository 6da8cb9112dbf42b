"""The noise of the random operations: a pure function of (seed, offset, index), the same on every backend.

Bits: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). With the 64-bit values taken
as two's complement, and block = index // 4,

    key     = (low 32 bits of seed, high 32 bits of seed)
    counter = (low 32 bits of block, high 32 bits of block, low 32 bits of offset, high 32 bits of offset)
    bits    = output word number index % 4

Uniform: f = float32(bits), rounded to nearest even; u = min((f + 0.5) * 2^-32, 1 - 2^-24), every step in float32, so
2^-33 <= u < 1.
Noise: -log(-log1p(-u)), a standard Gumbel variable. Large noise comes from small u, where float32 is dense: its range
is [-2.81, 22.87].

Test vectors (the noise to the seven digits that every backend reaches):

    seed                 offset               index   bits        u                               noise
    0                    0                    0       0x6627e8d5  0x1.989fa4p-2   0.39904648      0.6748404
    0                    0                    3       0x9b00dbd8  0x1.3601b8p-1   0.60548186      0.0724737
    -1                   -1                   2^34+3  0x923e0cbb  0x1.247c1ap-1   0.57125932      0.1661691
    0x299f31d0a4093822   0x0370734413198a2e   5       0x0ab83527  0x1.5706a4p-5   0.04187328      3.1517959
    7                    -3                   12345   0x99447705  0x1.3288eep-1   0.59870094      0.0909664
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_LOW = 0xFFFFFFFF


def philox4x32(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Ten rounds on 4 counter words and 2 key words -> 4 words. All words are int64 in [0, 2^32)."""
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57  # modulo 2^64
        counter = [(b >> 32 & _LOW) ^ counter[1] ^ key[0], b & _LOW, (a >> 32 & _LOW) ^ counter[3] ^ key[1], a & _LOW]
        key = [(key[0] + 0x9E3779B9) & _LOW, (key[1] + 0xBB67AE85) & _LOW]
    return counter


def random_bits(seed: torch.Tensor, offset: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """32 random bits per (seed, offset, index), broadcastable int64 tensors: int64 in [0, 2^32)."""
    block, word = index >> 2, index & 3
    a, b, c, d = philox4x32(
        [block & _LOW, block >> 32 & _LOW, offset & _LOW, offset >> 32 & _LOW], [seed & _LOW, seed >> 32 & _LOW]
    )
    return torch.where(word < 2, torch.where(word == 0, a, b), torch.where(word == 2, c, d))


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """Random bits (int64 in [0, 2^32)) -> float32 u in (0, 1)."""
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def gumbel(bits: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random bits -> standard Gumbel noise. u is always float32; `dtype` is that of the logarithms and the result."""
    return -torch.log(-torch.log1p(-uniform(bits).to(dtype)))


def gumbel_noise(shape: Sequence[int], seed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gumbel noise of `shape` on the seed's device: offset 0, index = position in C order."""
    index = torch.arange(math.prod(shape), device=seed.device).view(shape)
    return gumbel(random_bits(seed, torch.zeros_like(seed), index), dtype)


def as_seed(
    seed: int | torch.SymInt | torch.Tensor, name: str, shape: Sequence[int], device: torch.device
) -> torch.Tensor:
    """`seed` (an int, or an int64 tensor of `shape`) as an int64 tensor of `shape` on `device`. Does not synchronise.

    Raises:
        ValueError: a tensor of another dtype, shape or device, or an int that does not fit in 64 bits.
        TypeError: any other type.
    """
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.shape != torch.Size(shape) or seed.device != device:
            raise ValueError(
                f"{name} must be an int or an int64 tensor {list(shape)} on {device};"
                f" got {seed.dtype} {list(seed.shape)} on {seed.device}"
            )
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int or an int64 tensor {list(shape)}; got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, from -2**63 to 2**63 - 1; got {seed}")
    return torch.full(shape, seed, dtype=torch.int64, device=device)  # pyrefly: ignore[no-matching-overload]  # SymInt


def seeds_of(seed: int | torch.SymInt | torch.Tensor | None, count: int, device: torch.device) -> torch.Tensor:
    """One seed for each of `count` sequences, int64 [count]: those of a tensor; for sequence b the random bits of an
    int at offset -1 and indices 2 b (the high ones) and 2 b + 1; None: new ones from torch's generator.

    Raises: as `as_seed`.
    """
    if seed is None:
        return fresh_seed((count,), device)
    if isinstance(seed, torch.Tensor):
        return as_seed(seed, "seed", (count,), device)
    index = torch.arange(2 * count, device=device)
    bits = random_bits(as_seed(seed, "seed", (), device), torch.full_like(index, -1), index).view(count, 2)
    return (bits[:, 0] << 32) + bits[:, 1]


def fresh_seed(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """New seeds from torch's generator of `device`: int64 of `shape`."""
    return torch.randint(-(2**63), 2**63 - 1, shape, dtype=torch.int64, device=device)
