"""Philox4x32-10, the map to u and to Gumbel noise: published vectors, our vectors, and the implementations compared."""

import math
import re

import numpy as np
import pytest
import torch

from dalle_kernels import _host, philox
from statistics_for_tests import REJECT, frequencies_p

LOW = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with the paper (Salmon et al. 2011)
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((LOW, LOW, LOW, LOW), (LOW, LOW), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    words = philox.philox4x32([torch.tensor(x) for x in counter], [torch.tensor(x) for x in key])
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def documented_vectors():
    number = r"(\S+)\s+"
    row = re.compile(rf"^\s+{number * 3}(0x[0-9a-f]{{8}})\s+(\S+p\S+)\s+{number}(\S+)$", re.MULTILINE)
    return row.findall(philox.__doc__)


def test_the_documentation_holds_vectors():
    assert len(documented_vectors()) == 5


@pytest.mark.parametrize("vector", documented_vectors(), ids=lambda v: v[3])
def test_documented_vectors(vector):
    seed, offset, index = (int(x, 0) if "^" not in x else 2**34 + 3 for x in vector[:3])
    bits, u, noise = int(vector[3], 0), float.fromhex(vector[4]), float(vector[6])
    got = philox.random_bits(torch.tensor(seed), torch.tensor(offset), torch.tensor(index))
    assert int(got) == bits
    assert float(philox.uniform(got)) == u
    assert float(philox.gumbel(got)) == pytest.approx(noise, rel=1e-6)
    assert int(_host.philox(seed, offset, index, 1)[0]) == bits


def test_torch_and_cpp_draw_the_same_words(seed):
    for _ in range(20):
        key, offset = torch.randint(-(2**63), 2**63 - 1, (2,))
        first = int(torch.randint(0, 2 ** int(torch.randint(1, 62, ())), ()))
        words = philox.random_bits(key, offset, torch.arange(first, first + 37))
        assert np.array_equal(words.numpy(), _host.philox(int(key), int(offset), first, 37))


def test_u_is_the_documented_float32_expression(seed):
    edges = np.r_[0:5000, 2**24 - 5000 : 2**24 + 5000, 2**31 - 5000 : 2**31 + 5000, 2**32 - 5000 : 2**32]
    words = np.r_[edges, torch.randint(0, 2**32, (200_000,)).numpy()].astype(np.uint32)
    one = np.float32(1)
    expected = np.minimum((words.astype(np.float32) + one / 2) * np.float32(2.0**-32), one - np.float32(2.0**-24))
    u = philox.uniform(torch.from_numpy(words.astype(np.int64)))
    assert u.dtype == torch.float32
    assert np.array_equal(u.numpy(), expected)
    assert u.min() == 2.0**-33 and u.max() == 1 - 2.0**-24
    largest, smallest = philox.gumbel(torch.tensor([0, 2**32 - 1])).tolist()
    assert largest == pytest.approx(33 * math.log(2)) and smallest == pytest.approx(-math.log(24 * math.log(2)))


def test_words_are_uniform_and_independent_of_their_neighbours(seed):
    """The leading bits of pairs of adjacent words, along the index, the offset and the seed."""
    n, bins = 2**16, 16
    base = torch.randint(-(2**62), 2**62, ())
    steps = torch.arange(n)
    zero = torch.zeros_like(steps)
    for words in (
        philox.random_bits(base + zero, zero, steps),
        philox.random_bits(base + zero, steps, zero),
        philox.random_bits(base + steps, zero, zero),
    ):
        digit = words >> 28
        pairs = torch.bincount(digit[::2] * bins + digit[1::2], minlength=bins**2)
        assert frequencies_p(pairs, torch.full((bins**2,), bins**-2)) > REJECT


def test_negative_ranges_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        _host.philox(0, 0, -1, 4)
