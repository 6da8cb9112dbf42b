"""Batches as functions of seed and step, so that a resumed run sees the same data as an uninterrupted one."""

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
from dalle.files import digest

CACHE_BYTES = 4 << 30  # of decoded images kept in memory


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of batch `step` in an endless stream of shuffled epochs over `size` items, int64 [batch_size]."""
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // size, (last - 1) // size + 1)
    stream = torch.cat([_permutation(size, seed, epoch) for epoch in epochs])
    return stream[first - epochs[0] * size :][:batch_size]


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    # NumPy mixes all entries of a seed sequence; PyTorch's CPU generator uses only the low 32 bits of a seed.
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(size))


def step_seed(seed: int, step: int) -> int:
    """A distinct seed for every step of a training run."""
    return (seed << 32) + step


def images_digest(source: Source) -> str:
    """A digest of the images of a source and their order, from `Source.version`."""
    return digest("\n".join(map(source.version, range(len(source)))))


def choose_caption(captions: Sequence[str], seed: int, step: int, index: int) -> str:
    """One caption of image `index` for step `step`, uniformly sampled."""
    return captions[int(np.random.default_rng((seed, step, index)).integers(len(captions)))]


def drops_caption(rate: float, seed: int, step: int, index: int) -> bool:
    """Whether step `step` trains on image `index` without a caption, with probability `rate`."""
    # 2: independent of the choice of the caption and of the crop
    return rate > 0 and float(np.random.default_rng((seed, step, index, 2)).random()) < rate


def crop_generator(seed: int, step: int, index: int) -> np.random.Generator:
    """The random generator of the crop of image `index` in step `step`."""
    return np.random.default_rng((seed, step, index, 1))  # 1: independent of the choice of the caption


class Batch(NamedTuple):
    """Images, uint8 [B, 3, S, S], and their indices in the source, int64 [B]."""

    indices: Tensor
    images: Tensor


class ImageLoader:
    """Loads the images of a source in batches, prefetches one batch in threads, and caches decoded images in memory.

    An image that cannot be read is replaced by the next one in the source; the batch has the index of the replacement.

    Args:
        source: the images.
        batch_size: images per batch.
        seed: seed of the order and of the crops.
        crop: takes a random crop of the whole image in every step; None uses the source's centre squares.

    Raises:
        UserError: no image can be read.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, crop: Crop | None = None) -> None:
        self.source, self.batch_size, self.seed, self.crop = source, batch_size, seed, crop
        self.size = self._read(0, whole=False)[1].shape[-1]
        self._decoded: dict[int, tuple[int, Tensor]] = {}
        self._free_bytes, self._lock = CACHE_BYTES, threading.Lock()
        self._ahead: tuple[int, Future] | None = None
        self._decoders, self._prefetcher = ThreadPoolExecutor(4), ThreadPoolExecutor(1)

    def batch(self, step: int) -> Batch:
        """The batch of step `step`; raises UserError if no image can be read."""
        ready = self._ahead[1].result() if self._ahead and self._ahead[0] == step else self._load(step)
        self._ahead = step + 1, self._prefetcher.submit(self._load, step + 1)
        return ready

    def _load(self, step: int) -> Batch:
        indices = batch_indices(len(self.source), self.batch_size, self.seed, step).tolist()
        read, images = zip(*self._decoders.map(partial(self._image, step), indices))
        return Batch(torch.tensor(read), torch.stack(images))

    def _image(self, step: int, index: int) -> tuple[int, Tensor]:
        read, image = self._decode(index)
        if self.crop is None or image.shape[1:] == (self.size, self.size):  # a crop would be the image itself
            return read, image
        return read, self.crop(image, self.size, crop_generator(self.seed, step, index))

    def _decode(self, index: int) -> tuple[int, Tensor]:
        if index in self._decoded:
            return self._decoded[index]
        read, image = self._read(index, whole=self.crop is not None)
        with self._lock:
            if index not in self._decoded and image.numel() <= self._free_bytes:
                self._decoded[index] = read, image
                self._free_bytes -= image.numel()
        return read, image

    def _read(self, index: int, whole: bool) -> tuple[int, Tensor]:
        """The first readable image at or after `index`, wrapping around at the end, with its index."""
        count = len(self.source)
        for read, sample in self.source.readable(((index + i) % count for i in range(count)), whole=whole):
            return read, sample.image
        name, reason = self.source.skipped[-1]
        raise UserError(f"none of the {count} images can be read (the last one, {name}: {reason}): replace them")
