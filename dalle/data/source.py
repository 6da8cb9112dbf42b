"""The interface of sources of captioned images."""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

import torch

Part = Literal["train", "heldout"]
HELD_OUT_EVERY = 20  # one image in twenty is held out
_listing = threading.Lock()  # images are loaded from several threads


class Sample(NamedTuple):
    """A captioned image: ``image`` uint8 [3, S, S], at least one caption, and ``key``, unique within the source."""

    image: torch.Tensor
    captions: tuple[str, ...]
    key: str

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


class UnreadableImage(Exception):
    """An image cannot be decoded; the message is the reason."""


class Source(Sequence[Sample]):
    """A fixed sequence of captioned images.

    A subclass implements ``__len__``, ``key``, ``captions_of`` and ``load``, and ``load_whole`` if its images are not
    square. Only the last two read pixels. ``skipped`` lists unusable images as (name, reason). It grows when `readable`
    finds an image that cannot be decoded; a DataLoader worker has its own copy.
    """

    skipped: list[tuple[str, str]]

    def key(self, index: int) -> str:
        """The name of an image, unique within the source."""
        raise NotImplementedError

    def version(self, index: int) -> str:
        """A text that differs if the image does, without decoding it: the name, if a name means one image forever."""
        return self.key(index)

    def captions_of(self, index: int) -> tuple[str, ...]:
        """All captions of an image, at least one."""
        raise NotImplementedError

    def load(self, index: int) -> Sample:
        """The sample, with a square image; raises UnreadableImage."""
        raise NotImplementedError

    def load_whole(self, index: int) -> Sample:
        """The sample with the whole image, uint8 [3, h, w], from which `crops` takes crops; raises UnreadableImage."""
        return self.load(index)

    def caption(self, index: int) -> str:
        """The first caption of an image."""
        return self.captions_of(index)[0]

    def captions(self) -> Iterator[str]:
        """All captions of all images, without decoding any image."""
        return (caption for i in range(len(self)) for caption in self.captions_of(i))

    def split(self, part: Part) -> "Source":
        """The training or the held-out split; see `dalle.data.split`."""
        held_out = part == "heldout"
        return Subset(self, [i for i in range(len(self)) if _is_held_out(self.key(i)) == held_out])

    def __getitem__(self, index: int) -> Sample:  # pyrefly: ignore[bad-override]  # no slices
        """Sample `index`; raises UnreadableImage if it cannot be decoded, IndexError if there is none."""
        return self.load(index)

    def readable(self, indices: Iterable[int] | None = None, *, whole: bool = False) -> Iterator[tuple[int, Sample]]:
        """Yields (index, sample) for the images that can be decoded; adds the others to ``skipped``.

        Args:
            indices: which images, in this order; by default all.
            whole: load samples with `load_whole`.
        """
        for index in range(len(self)) if indices is None else indices:
            try:
                sample = self.load_whole(index) if whole else self.load(index)
            except UnreadableImage as error:
                self._skip(self.key(index), str(error))
            else:
                yield index, sample

    def _skip(self, name: str, reason: str) -> None:
        with _listing:
            if (name, reason) not in self.skipped:
                self.skipped.append((name, reason))


OfSource = TypeVar("OfSource", bound=Source)


class Subset(Source, Generic[OfSource]):
    """The samples of ``source`` at ``indices``; shares its list of skipped images."""

    def __init__(self, source: OfSource, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = indices
        self.skipped = source.skipped

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.source.key(self.indices[index])

    def version(self, index: int) -> str:
        return self.source.version(self.indices[index])

    def captions_of(self, index: int) -> tuple[str, ...]:
        return self.source.captions_of(self.indices[index])

    def load(self, index: int) -> Sample:
        return self.source.load(self.indices[index])

    def load_whole(self, index: int) -> Sample:
        return self.source.load_whole(self.indices[index])


def _is_held_out(key: str) -> bool:
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0
