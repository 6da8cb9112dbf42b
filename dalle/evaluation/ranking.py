"""Image similarity: the rank of a caption's own image among all images of a source, as neighbours of a generated image.

Images are averaged to 16x16 pixels and compared by squared distance, without any learned measure.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.data import Source
from dalle.evaluation.evaluation_set import BATCH, Track, chunks
from dalle.evaluation.statistics import proportion

SIDE = 16
UNIT = 256  # thumbnails are in integer units of 1/256 grey level, so that distances are exact and equal images tie
TOPS = (1, 5, 10)


class Gallery:
    """Thumbnails of all images of a source, the training split first."""

    def __init__(self, training: Source, held_out: Source, track: Track) -> None:
        small, self.captions = [], []
        for name, part in {"training": training, "held-out": held_out}.items():
            for chunk in track(f"all images, {name}", chunks(range(len(part)), BATCH)):
                for i, sample in part.readable(chunk):
                    small.append(thumbnails(sample.image[None]))
                    self.captions.append(part.captions_of(i))
            if part is training:
                self.training = [(caption, i) for i, captions in enumerate(self.captions) for caption in captions]
        self.thumbnails = torch.cat(small)
        self.indices = index_by_caption(self.captions)

    def rank(self, captions: Sequence[str], images: Tensor) -> dict:
        """`summary` of the ranks of the captions' own images as neighbours of `images`, uint8 [n, 3, S, S]."""
        return self._rank(captions, thumbnails(images))

    def rank_of_nearest_caption(self, captions: Sequence[str]) -> dict:
        """Baseline: `rank` of the training image whose caption has the most words in common with each of `captions`."""
        training = [(other, words(other)) for other, _ in self.training]
        chosen = [self.training[nearest_caption(caption, training)][1] for caption in captions]
        return self._rank(captions, self.thumbnails[chosen])

    def _rank(self, captions: Sequence[str], queries: Tensor) -> dict:
        matches = [self.indices[caption] for caption in captions]
        batches = zip(queries.split(BATCH), chunks(matches, BATCH))
        return summary(torch.cat([ranks(distances(batch, self.thumbnails), match) for batch, match in batches]))


def thumbnails(images: Tensor) -> Tensor:
    """Images, uint8 [n, 3, S, S], box-averaged to 16x16, as integers in float32 [n, 3 * 16 * 16]."""
    return (F.adaptive_avg_pool2d(images.double(), SIDE) * UNIT).round().flatten(1).float()


def distances(queries: Tensor, gallery: Tensor) -> Tensor:
    """Squared distances between two sets of thumbnails [n, d] and [m, d], exact, float64 [n, m]."""
    a, b = queries.double(), gallery.double()
    return (a * a).sum(1)[:, None] - 2 * a @ b.T + (b * b).sum(1)


def ranks(distances: Tensor, matches: Sequence[Sequence[int]]) -> Tensor:
    """The rank of the nearest match in every row, int64 [n]: 1 + the number of columns that are strictly nearer.

    Args:
        distances: [n, m].
        matches: the matching columns of every row, at least one each.
    """
    nearest = torch.stack([row[list(columns)].min() for row, columns in zip(distances, matches, strict=True)])
    return 1 + (distances < nearest[:, None]).sum(1)


def summary(ranks: Tensor) -> dict:
    """Top-1, top-5 and top-10 accuracy, the median rank, and all ranks."""
    accuracies = {f"top-{top}": proportion(int((ranks <= top).sum()), len(ranks)) for top in TOPS}
    return accuracies | {"median rank": ranks.double().quantile(0.5).item(), "ranks": ranks.tolist()}


def nearest_caption(caption: str, others: Sequence[tuple[str, frozenset[str]]]) -> int:
    """Index of the caption in `others`, pairs of caption and words, that has the most words in common with `caption`.

    Captions equal to `caption` are excluded. Ties go to the one with the fewest words not in common, then to the first.
    """
    own = words(caption)
    eligible = [i for i, (other, _) in enumerate(others) if other != caption]
    return min(eligible, key=lambda i: (-len(own & others[i][1]), len(own ^ others[i][1]), i))


def words(caption: str) -> frozenset[str]:
    """The set of a caption's words, in lower case. "medium-light" counts as two words."""
    return frozenset(re.findall(r"\w+", caption.lower()))


def index_by_caption(captions_of_images: Iterable[Sequence[str]]) -> dict[str, list[int]]:
    """Maps every caption to the indices of the images that have it."""
    indices: dict[str, list[int]] = {}
    for i, captions in enumerate(captions_of_images):
        for caption in dict.fromkeys(captions):
            indices.setdefault(caption, []).append(i)
    return indices
