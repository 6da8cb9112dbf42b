"""Pictures to evaluate on: evenly spaced ones of each part, with their captions, codes and reconstructions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from dalle import images
from dalle.data import Source
from dalle.generation.pipeline import Drawing, Pipeline
from dalle.models.dvae import DiscreteVAE

BATCH = 64  # real pictures at a time
AT_ONCE = 128  # drawn ones
Track = Callable[[str, Sequence], Iterable]  # (title, items) -> the same items, while it shows how far they are


def silently(title: str, items: Sequence) -> Iterable:
    """The Track that shows nothing."""
    return items


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one part, i-th entries belong together."""

    indices: list[int]
    """Places in the part."""
    captions: list[str]
    """The first caption of each."""
    images: Tensor
    """uint8 [n, 3, S, S]."""
    codes: Tensor
    """int64 [n, rows, columns]."""
    copies: Tensor
    """What the dVAE makes of the codes, uint8 [n, 3, S, S]."""


def spaced(count: int, cap: int) -> list[int]:
    """At most `cap` of the numbers below `count`, evenly spaced."""
    return [i * count // cap for i in range(cap)] if cap < count else list(range(count))


def chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.inference_mode()
def look(dvae: DiscreteVAE, part: Source, indices: Sequence[int], track: Track, title: str) -> PictureSet:
    """The pictures at `indices` of a part, less the unreadable ones, through the dVAE and back."""
    device, size, grid = next(dvae.parameters()).device, dvae.config.image_size, dvae.config.grid
    places, originals = [], [torch.empty(0, 3, size, size, dtype=torch.uint8)]
    codes, copies = [torch.empty(0, grid, grid, dtype=torch.int64)], [originals[0]]
    for chunk in track(title, chunks(indices, BATCH)):
        samples = dict(part.readable(chunk))
        if not samples:
            continue
        places += samples
        originals.append(torch.stack([sample.image for sample in samples.values()]))
        read = dvae.codes(originals[-1].to(device))
        codes.append(read.cpu())
        copies.append(images.to_uint8(dvae.decode(read)).cpu())
    captions = [part.caption(i) for i in places]
    return PictureSet(places, captions, torch.cat(originals), torch.cat(codes), torch.cat(copies))


def draw(
    pipeline: Pipeline, captions: Sequence[str], candidates: int, seed: int, track: Track, title: str
) -> Iterator[list[Drawing]]:
    """What `Pipeline.generate` draws for every caption, in the order of the seeds.

    Caption i has the seeds from seed + i * candidates on: as no two captions share one, their draws are independent.
    """
    at_once = max(1, AT_ONCE // candidates) * candidates
    for chunk in track(title, chunks(range(len(captions) * candidates), at_once)):
        first = list(chunk[::candidates])
        some = [captions[i // candidates] for i in first]
        rows = pipeline.generate(
            some, candidates=candidates, seed=[seed + i for i in first], truncate=True, batch_size=AT_ONCE
        )
        yield from (sorted(row, key=lambda drawing: drawing.seed) for row in rows)


def first_and_best(
    pipeline: Pipeline, captions: Sequence[str], candidates: int, seed: int, track: Track, title: str
) -> dict[str, Tensor]:
    """What is drawn for captions, uint8 [n, 3, S, S]: the first candidate, and the best one by CLIP if there is one."""
    ranked = pipeline.clip is not None and candidates > 1
    first, best = [], []
    for row in draw(pipeline, captions, candidates if ranked else 1, seed, track, title):
        first.append(images.to_tensor(row[0].image))
        if ranked:
            best.append(images.to_tensor(max(row, key=attrgetter("score")).image))
    kinds = {"first candidate": torch.stack(first)}
    return kinds | ({f"best of {candidates} by CLIP": torch.stack(best)} if ranked else {})
