"""Which pictures a step sees, as a function of seed and step, so that a resumed run sees what it would have seen."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalle.data import Source
from dalle.data.crops import Crop
from dalle.errors import UserError

IN_MEMORY = 4 << 30  # bytes of pictures that are kept decoded


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Batch `step` of an endless stream of shuffled epochs over `size` items, int64 [batch_size]."""
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // size, (last - 1) // size + 1)
    stream = torch.cat([_permutation(size, seed, epoch) for epoch in epochs])
    return stream[first - epochs[0] * size :][:batch_size]


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    # NumPy mixes all of a sequence of seeds; PyTorch's CPU generator would use the low 32 bits of a combined one.
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(size))


def step_seed(seed: int, step: int) -> int:
    """A seed of its own for every step of a run."""
    return (seed << 32) + step


def choose_caption(captions: Sequence[str], seed: int, step: int, index: int) -> str:
    """The caption that step `step` sees of picture `index`: one of its captions, all of them equally often."""
    return captions[int(np.random.default_rng((seed, step, index)).integers(len(captions)))]


def crop_generator(seed: int, step: int, index: int) -> np.random.Generator:
    """The randomness of the crop that step `step` sees of picture `index`."""
    return np.random.default_rng((seed, step, index, 1))  # 1: other numbers than those that choose the caption


class Batch(NamedTuple):
    """Pictures uint8 [B, 3, S, S], and where in the source they come from, int64 [B]."""

    indices: Tensor
    pictures: Tensor


class PictureLoader:
    """The pictures of a source in batches, made one batch ahead in threads; as many as fit in memory stay decoded.

    For a picture that cannot be read the next one in the source is taken, and the batch says so.

    crop: how a square is cut from a whole picture, anew in every step; without it the source's own squares come.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, crop: Crop | None = None) -> None:
        self.source, self.batch_size, self.seed, self.crop = source, batch_size, seed, crop
        self.size = self._read(0, whole=False)[1].shape[-1]
        self._decoded: dict[int, tuple[int, Tensor]] = {}
        self._room, self._counting = IN_MEMORY, threading.Lock()
        self._ahead: tuple[int, Future] | None = None
        self._decoders, self._prefetcher = ThreadPoolExecutor(4), ThreadPoolExecutor(1)

    def batch(self, step: int) -> Batch:
        """What step `step` sees; raises UserError if no picture can be read."""
        ready = self._ahead[1].result() if self._ahead and self._ahead[0] == step else self._load(step)
        self._ahead = step + 1, self._prefetcher.submit(self._load, step + 1)
        return ready

    def _load(self, step: int) -> Batch:
        indices = batch_indices(len(self.source), self.batch_size, self.seed, step).tolist()
        read, pictures = zip(*self._decoders.map(partial(self._picture, step), indices))
        return Batch(torch.tensor(read), torch.stack(pictures))

    def _picture(self, step: int, index: int) -> tuple[int, Tensor]:
        read, picture = self._decode(index)
        if self.crop is None or picture.shape[1:] == (self.size, self.size):  # of which any crop is the picture itself
            return read, picture
        return read, self.crop(picture, self.size, crop_generator(self.seed, step, index))

    def _decode(self, index: int) -> tuple[int, Tensor]:
        if index in self._decoded:
            return self._decoded[index]
        read, picture = self._read(index, whole=self.crop is not None)
        with self._counting:
            if index not in self._decoded and picture.numel() <= self._room:
                self._decoded[index] = read, picture
                self._room -= picture.numel()
        return read, picture

    def _read(self, index: int, whole: bool) -> tuple[int, Tensor]:
        """The first picture from `index` on, around the end, that can be read, and its index."""
        count = len(self.source)
        for read, sample in self.source.readable(((index + i) % count for i in range(count)), whole=whole):
            return read, sample.image
        name, reason = self.source.skipped[-1]
        raise UserError(f"none of the {count} pictures can be read (the last one, {name}: {reason}): replace them")
