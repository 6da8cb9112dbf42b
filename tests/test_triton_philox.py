"""The noise of the Triton kernels: the same bits as dalle_kernels/philox.py, and noise to seven digits."""

import torch
from triton_for_tests import on_device  # noqa: F401  before Triton: skips where it cannot run

# isort: split
import triton
import triton.language as tl

from dalle_kernels import philox
from dalle_kernels.backends.triton.philox import gumbel, random_bits


@triton.jit
def _noise(seed, offset, index, bits, noise, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    drawn = random_bits(tl.load(seed), tl.load(offset), tl.load(index + at, at < n, 0))
    tl.store(bits + at, drawn.to(tl.int64), at < n)
    tl.store(noise + at, gumbel(drawn), at < n)


def noise(seed, offset, index):
    """(bits, noise) of the kernel's functions for one seed and offset."""
    seed, offset = (torch.tensor([x]) for x in (seed, offset))
    bits, numbers = torch.empty_like(index), torch.empty(index.shape)
    _noise[(-(-len(index) // 256),)](seed, offset, index, bits, numbers, len(index), BLOCK=256)
    return bits, numbers


def test_bits_and_noise(seed):
    limit = 2**62
    index = torch.cat([torch.arange(100), torch.randint(0, limit, (3000,)), torch.randint(0, 2**34, (900,))])
    for _ in range(3):
        key, offset = torch.randint(-limit, limit, (2,)).tolist()
        bits, numbers = noise(key, offset, index)
        assert torch.equal(bits, philox.random_bits(torch.tensor(key), torch.tensor(offset), index))
        torch.testing.assert_close(numbers, philox.gumbel(bits, torch.float64).float(), rtol=3e-7, atol=1e-7)


def test_vectors():
    """The test vectors of dalle_kernels/philox.py."""
    for key, offset, index, bits, number in (
        (0, 0, 0, 0x6627E8D5, 0.6748404),
        (-1, -1, 2**34 + 3, 0x923E0CBB, 0.1661691),
        (0x299F31D0A4093822, 0x0370734413198A2E, 5, 0x0AB83527, 3.1517959),
        (7, -3, 12345, 0x99447705, 0.0909664),
    ):
        drawn, numbers = noise(key, offset, torch.tensor([index]))
        assert drawn.item() == bits
        assert abs(numbers.item() - number) < 2e-7 * max(1, number)


@triton.jit
def _gumbel(bits, noise, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(noise + at, gumbel(tl.load(bits + at).to(tl.uint32)))


def test_the_ends_of_the_range():
    bits = torch.tensor([0, 1, 2, 3, 2**31, 2**32 - 300, 2**32 - 129, 2**32 - 1])
    numbers = torch.empty(8)
    _gumbel[(1,)](bits, numbers, BLOCK=8)
    torch.testing.assert_close(numbers, philox.gumbel(bits, torch.float64).float(), rtol=3e-7, atol=1e-7)
