"""Images of synthetic shapes: which attributes of its caption an image shows, by the exact parser."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle.data.shapes import Scene
from dalle.data.shapes_parser import compare, parse
from dalle.evaluation.statistics import proportion, wilson

ATTRIBUTES = ("colour", "shape", "size", "count", "position", "relation", "joint")


class CachingParser:
    """Parses images; equal ones only once."""

    def __init__(self) -> None:
        self._scenes: dict[bytes, Scene] = {}

    def parse(self, image: Tensor) -> Scene:
        """The scene in an image, uint8 [3, S, S]."""
        key = image.numpy().tobytes()
        if key not in self._scenes:
            self._scenes[key] = parse(image)
        return self._scenes[key]

    def attributes(self, scene: Scene, image: Tensor) -> dict[str, bool]:
        """Whether each attribute that the caption of `scene` mentions is correct in the image, and "joint": all are.

        "joint" also implies that nothing else is in the image, because sets of values are compared and the objects of
        counts and relations are counted.
        """
        correct = compare(scene, self.parse(image))
        return correct | {"joint": all(correct.values())}


def accuracy(parser: CachingParser, scenes: Sequence[Scene], images: Tensor) -> dict[str, dict]:
    """The accuracy of each attribute over the images, uint8 [n, 3, S, S], whose captions mention it."""
    rows = [parser.attributes(scene, image) for scene, image in zip(scenes, images, strict=True)]
    mentioned = {name: [row[name] for row in rows if name in row] for name in ATTRIBUTES}
    return {name: proportion(sum(correct), len(correct)) for name, correct in mentioned.items() if correct}


def against_candidates(correct: Tensor, scores: Tensor) -> dict[str, list]:
    """Accuracy of the best-scored of N candidates, N = 1, 2, 4, …, and how often any of the N is correct (oracle).

    Candidates are split into disjoint groups of N. The mean over the groups of a caption is an unbiased estimate for N
    candidates; the result is the mean over captions. The intervals count each caption once.

    Args:
        correct: bool [captions, candidates].
        scores: higher is better, [captions, candidates].
    """
    captions, candidates = correct.shape
    curve = {"candidates": [], "ranked": [], "ranked, 95 %": [], "oracle": [], "oracle, 95 %": []}
    for exponent in range(candidates.bit_length()):
        size = 2**exponent
        groups = candidates // size
        grouped, by = (x[:, : groups * size].unflatten(1, (groups, size)) for x in (correct, scores))
        chosen = grouped.gather(2, by.argmax(2, keepdim=True))[..., 0]
        curve["candidates"].append(size)
        for name, hits in {"ranked": chosen, "oracle": grouped.any(2)}.items():
            value = hits.double().mean().item()
            curve[name].append(value)
            curve[f"{name}, 95 %"].append(wilson(value * captions, captions))
    return curve


def curves(attributes: Sequence[Sequence[dict[str, bool]]], scores: Tensor) -> dict[str, dict]:
    """`against_candidates` for each attribute.

    Args:
        attributes: the result of `CachingParser.attributes` for every caption and candidate.
        scores: [captions, candidates].
    """
    result = {}
    for name in ATTRIBUTES:
        rows = [i for i, candidates in enumerate(attributes) if name in candidates[0]]
        if rows:
            correct = torch.tensor([[row[name] for row in attributes[i]] for i in rows])
            result[name] = {"captions": len(rows)} | against_candidates(correct, scores[rows])
    return result
