"""Does a picture look like the one of its caption? The rank of that one among all pictures of a source.

All pictures are averaged to 16x16 pixels and compared by squared distance, without any learned measure.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.data import Source
from dalle.evaluation.pictures import BATCH, Track, chunks
from dalle.evaluation.statistics import share

SIDE = 16
UNIT = 256  # thumbnails are whole numbers of 1/256 of a level: distances are exact, and equal pictures tie
TOPS = (1, 5, 10)


class Gallery:
    """Every picture of a source as a thumbnail, those of the training part first."""

    def __init__(self, training: Source, held_out: Source, track: Track) -> None:
        small, self.captions = [], []
        for name, part in {"training": training, "held-out": held_out}.items():
            for chunk in track(f"all pictures, {name}", chunks(range(len(part)), BATCH)):
                for i, sample in part.readable(chunk):
                    small.append(thumbnails(sample.image[None]))
                    self.captions.append(part.captions_of(i))
            if part is training:
                self.known = [(caption, i) for i, captions in enumerate(self.captions) for caption in captions]
        self.thumbnails = torch.cat(small)
        self.places = by_caption(self.captions)

    def rank(self, captions: Sequence[str], pictures: Tensor) -> dict:
        """How near pictures, uint8 [n, 3, S, S], are to those of their captions."""
        return self._rank(captions, thumbnails(pictures))

    def rank_of_most_alike(self, captions: Sequence[str]) -> dict:
        """The same for the pictures of the training captions that have the most words in common with `captions`."""
        known = [(other, words(other)) for other, _ in self.known]
        chosen = [self.known[most_alike(caption, known)][1] for caption in captions]
        return self._rank(captions, self.thumbnails[chosen])

    def _rank(self, captions: Sequence[str], small: Tensor) -> dict:
        wanted = [self.places[caption] for caption in captions]
        batches = zip(small.split(BATCH), chunks(wanted, BATCH))
        return summary(torch.cat([ranks(distances(some, self.thumbnails), right) for some, right in batches]))


def thumbnails(pictures: Tensor) -> Tensor:
    """Pictures uint8 [n, 3, S, S] averaged over boxes to 16x16, whole numbers in float32 [n, 3 * 16 * 16]."""
    return (F.adaptive_avg_pool2d(pictures.double(), SIDE) * UNIT).round().flatten(1).float()


def distances(shown: Tensor, gallery: Tensor) -> Tensor:
    """Squared distances of two sets of thumbnails, exact in float64 [n, m]."""
    a, b = shown.double(), gallery.double()
    return (a * a).sum(1)[:, None] - 2 * a @ b.T + (b * b).sum(1)


def ranks(distances: Tensor, wanted: Sequence[Sequence[int]]) -> Tensor:
    """For every row of `distances` [n, m], 1 + the number of columns strictly nearer than the nearest wanted one.

    wanted: the right columns of every row, at least one each. Returns int64 [n].
    """
    nearest = torch.stack([row[list(columns)].min() for row, columns in zip(distances, wanted, strict=True)])
    return 1 + (distances < nearest[:, None]).sum(1)


def summary(ranks: Tensor) -> dict:
    """The share of pictures within the first 1, 5 and 10, the median rank, and all ranks."""
    shares = {f"top-{top}": share(int((ranks <= top).sum()), len(ranks)) for top in TOPS}
    return shares | {"median rank": ranks.double().quantile(0.5).item(), "ranks": ranks.tolist()}


def most_alike(caption: str, others: Sequence[tuple[str, frozenset[str]]]) -> int:
    """Index of the caption in `others`, each with its words, that has the most words in common with `caption`.

    The caption itself does not count. Captions are sets of words; ties go to the one with the fewest words not in
    common, then to the first.
    """
    own = words(caption)
    able = [i for i, (other, _) in enumerate(others) if other != caption]
    return min(able, key=lambda i: (-len(own & others[i][1]), len(own ^ others[i][1]), i))


def words(caption: str) -> frozenset[str]:
    """The set of a caption's words, in lower case; "medium-light" are two, so that it is near both."""
    return frozenset(re.findall(r"\w+", caption.lower()))


def by_caption(captions_of_pictures: Iterable[Sequence[str]]) -> dict[str, list[int]]:
    """The indices of the pictures that have a caption, for every caption."""
    places: dict[str, list[int]] = {}
    for i, captions in enumerate(captions_of_pictures):
        for caption in dict.fromkeys(captions):
            places.setdefault(caption, []).append(i)
    return places
