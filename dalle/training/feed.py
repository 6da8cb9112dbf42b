"""Which pictures a step sees, as a function of seed and step, so that a resumed run sees what it would have seen."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dalle.data import Source

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
    return captions[np.random.default_rng((seed, step, index)).integers(len(captions))]


class Pictures:
    """The pictures of a source in batches: all decoded at once if they fit, otherwise one batch ahead in threads."""

    def __init__(self, source: Source, batch_size: int, seed: int):
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._ahead: tuple[int, Future] | None = None
        self._decoders, self._prefetcher = ThreadPoolExecutor(4), ThreadPoolExecutor(1)
        fits = len(source) * source[0].image.numel() <= IN_MEMORY
        self._decoded = self._load(range(len(source))) if fits else None

    def batch(self, step: int) -> Tensor:
        """uint8 [batch_size, 3, S, S]."""
        indices = batch_indices(len(self.source), self.batch_size, self.seed, step)
        if self._decoded is not None:
            return self._decoded[indices]
        ready = self._ahead[1].result() if self._ahead and self._ahead[0] == step else self._load(indices.tolist())
        following = batch_indices(len(self.source), self.batch_size, self.seed, step + 1).tolist()
        self._ahead = step + 1, self._prefetcher.submit(self._load, following)
        return ready

    def _load(self, indices) -> Tensor:
        return torch.stack(list(self._decoders.map(lambda i: self.source[i].image, indices)))
