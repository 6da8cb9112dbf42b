"""Pictures to evaluate on: evenly spaced ones of each part, with their captions, codes and reconstructions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle import images
from dalle.data import Source
from dalle.dvae import DiscreteVAE
from dalle.pipeline import Pipeline

BATCH = 64  # real pictures at a time
AT_ONCE = 128  # drawn ones
Track = Callable[[str, Sequence], Iterable]  # (title, items) -> the same items, while it shows how far they are


def silently(title: str, items: Sequence) -> Iterable:
    """The Track that shows nothing."""
    return items


@dataclass(frozen=True)
class Pictures:
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


def readable(source: Source, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Index and picture of those that can be read; a source gives the next picture for one that cannot."""
    for i in indices:
        sample = source[i]
        if sample.key == source.key(i):
            yield i, sample.image


@torch.inference_mode()
def look(dvae: DiscreteVAE, part: Source, indices: Sequence[int], track: Track, title: str) -> Pictures:
    """The pictures at `indices` of a part, less the unreadable ones, through the dVAE and back."""
    device, size, grid = next(dvae.parameters()).device, dvae.config.image_size, dvae.config.grid
    places, originals = [], [torch.empty(0, 3, size, size, dtype=torch.uint8)]
    codes, copies = [torch.empty(0, grid, grid, dtype=torch.int64)], [originals[0]]
    for chunk in track(title, chunks(indices, BATCH)):
        found = list(readable(part, chunk))
        if not found:
            continue
        places += [i for i, _ in found]
        originals.append(torch.stack([picture for _, picture in found]))
        read = dvae.codes(originals[-1].to(device))
        codes.append(read.cpu())
        copies.append(images.to_uint8(dvae.decode(read)).cpu())
    captions = [part.caption(i) for i in places]
    return Pictures(places, captions, torch.cat(originals), torch.cat(codes), torch.cat(copies))


def draw(
    pipeline: Pipeline, captions: Sequence[str], candidates: int, seed: int, track: Track, title: str
) -> Iterator[Tensor]:
    """For every caption the pictures that `Pipeline.generate` draws for it, uint8 [candidates, 3, S, S].

    Caption i has the seeds from seed + i * candidates on: as no two captions share one, their draws are independent.
    Batches hold pictures of several captions, or, where there are many candidates, only some of one.
    """
    at_once = max(1, AT_ONCE // candidates) * candidates
    for chunk in track(title, chunks(range(len(captions) * candidates), at_once)):
        some = captions[chunk[0] // candidates : chunk[-1] // candidates + 1]
        yield from _draw(pipeline, some, (seed + torch.tensor(chunk)).view(len(some), candidates))


@torch.inference_mode()
def _draw(pipeline: Pipeline, captions: Sequence[str], seeds: Tensor) -> Tensor:
    """One picture for each of the seeds [captions, candidates], uint8 [captions, candidates, 3, S, S]."""
    tokens = [pipeline.tokenizer.encode(caption) for caption in captions]
    text = pipeline.prior.pack_text(tokens, truncate=True).to(pipeline.device)
    drawn = []
    for some in seeds.to(pipeline.device).split(AT_ONCE, dim=1):
        codes = pipeline.prior.generate(text, candidates=some.shape[1], seeds=some.flatten())
        drawn.append(pipeline.decode(codes).unflatten(0, tuple(some.shape)))
    return torch.cat(drawn, dim=1)


def first_and_best(
    pipeline: Pipeline, captions: Sequence[str], candidates: int, seed: int, track: Track, title: str
) -> dict[str, Tensor]:
    """What is drawn for captions, uint8 [n, 3, S, S]: the first candidate, and the best one by CLIP if there is one."""
    ranked = pipeline.clip is not None and candidates > 1
    first, best = [], []
    drawn = draw(pipeline, captions, candidates if ranked else 1, seed, track, title)
    for caption, pictures in zip(captions, drawn, strict=True):
        first.append(pictures[0])
        if ranked:
            best.append(pictures[pipeline.score(pictures, caption, truncate=True).argmax()])
    found = {"first candidate": torch.stack(first)}
    return found | ({f"best of {candidates} by CLIP": torch.stack(best)} if ranked else {})
