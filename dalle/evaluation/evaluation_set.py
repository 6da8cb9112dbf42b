"""Images to evaluate on, with captions, codes and reconstructions, and images generated from their captions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from dalle.data import Source
from dalle.generation.pipeline import GeneratedImage, Pipeline
from dalle.images import to_tensor, to_uint8
from dalle.models.vqgan import ImageTokenizer

BATCH = 64  # real images per batch
GENERATION_BATCH = 128  # generated images per batch
Track = Callable[[str, Sequence], Iterable]  # (title, items) -> the same items, while showing the progress


def no_progress(title: str, items: Sequence) -> Iterable:
    """A Track that shows nothing."""
    return items


@dataclass(frozen=True)
class EvaluationSet:
    """Images of one split, with one entry per image in every field."""

    indices: list[int]
    """Indices in the split."""
    captions: list[str]
    """The first caption of each image."""
    images: Tensor
    """uint8 [n, 3, S, S]."""
    codes: Tensor
    """int64 [n, rows, columns]."""
    reconstructions: Tensor
    """The dVAE's reconstructions, uint8 [n, 3, S, S]."""


def evenly_spaced(count: int, cap: int) -> list[int]:
    """At most `cap` of the integers below `count`, evenly spaced."""
    return [i * count // cap for i in range(cap)] if cap < count else list(range(count))


def chunks(items: Sequence, size: int) -> list[Sequence]:
    """Splits a sequence into chunks of `size`, the last one shorter if need be."""
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.inference_mode()
def build_evaluation_set(
    dvae: ImageTokenizer, part: Source, indices: Sequence[int], track: Track, title: str
) -> EvaluationSet:
    """Loads the readable images at `indices` of a split, encodes them and decodes the codes."""
    device, size, grid = next(dvae.parameters()).device, dvae.config.image_size, dvae.config.grid
    readable, originals = [], [torch.empty(0, 3, size, size, dtype=torch.uint8)]
    codes, decoded = [torch.empty(0, grid, grid, dtype=torch.int64)], [originals[0]]
    for chunk in track(title, chunks(indices, BATCH)):
        samples = dict(part.readable(chunk))
        if not samples:
            continue
        readable += samples
        originals.append(torch.stack([sample.image for sample in samples.values()]))
        batch_codes = dvae.codes(originals[-1].to(device))
        codes.append(batch_codes.cpu())
        decoded.append(to_uint8(dvae.decode(batch_codes)).cpu())
    captions = [part.caption(i) for i in readable]
    return EvaluationSet(readable, captions, torch.cat(originals), torch.cat(codes), torch.cat(decoded))


def generate(
    pipeline: Pipeline, captions: Sequence[str], candidates: int, seed: int, track: Track, title: str
) -> Iterator[list[GeneratedImage]]:
    """Yields the candidates for every caption, sorted by seed.

    Candidate j of caption i uses seed + i * candidates + j. No two captions share a seed, so their samples are
    independent.
    """
    chunk_size = max(1, GENERATION_BATCH // candidates) * candidates
    for chunk in track(title, chunks(range(len(captions) * candidates), chunk_size)):
        first = list(chunk[::candidates])
        prompts = [captions[i // candidates] for i in first]
        seeds = [seed + i for i in first]
        rows = pipeline.generate(prompts, candidates=candidates, seed=seeds, truncate=True, batch_size=GENERATION_BATCH)
        yield from (sorted(row, key=lambda result: result.seed) for row in rows)


def first_and_best(
    pipeline: Pipeline, captions: Sequence[str], candidates: int, seed: int, track: Track, title: str
) -> dict[str, Tensor]:
    """Generates images for captions, uint8 [n, 3, S, S] by kind: candidate 0, and the best by CLIP if there is one."""
    ranked = pipeline.clip is not None and candidates > 1
    first, best = [], []
    for row in generate(pipeline, captions, candidates if ranked else 1, seed, track, title):
        first.append(to_tensor(row[0].image))
        if ranked:
            best.append(to_tensor(max(row, key=attrgetter("score")).image))
    kinds = {"first candidate": torch.stack(first)}
    return kinds | ({f"best of {candidates} by CLIP": torch.stack(best)} if ranked else {})
