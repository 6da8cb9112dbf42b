"""Drawn shapes: which attributes of its caption does a picture show? The exact parser tells."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle.data.shapes import Scene
from dalle.data.shapes_parser import compare, parse
from dalle.evaluation.statistics import share, wilson

ATTRIBUTES = ("colour", "shape", "size", "count", "position", "relation", "joint")


class Reader:
    """Parses pictures, equal ones once."""

    def __init__(self) -> None:
        self._scenes: dict[bytes, Scene] = {}

    def read(self, picture: Tensor) -> Scene:
        """The scene in a picture, uint8 [3, S, S]."""
        key = picture.numpy().tobytes()
        if key not in self._scenes:
            self._scenes[key] = parse(picture)
        return self._scenes[key]

    def attributes(self, scene: Scene, picture: Tensor) -> dict[str, bool]:
        """Which attributes that the caption of `scene` mentions are right in the picture, and "joint": whether all are.

        As sets are compared, and the objects of counts and relations counted, joint also means that nothing else is
        in the picture.
        """
        right = compare(scene, self.read(picture))
        return right | {"joint": all(right.values())}


def accuracy(reader: Reader, scenes: Sequence[Scene], pictures: Tensor) -> dict[str, dict]:
    """For each attribute, in how many of the pictures whose captions mention it it is right."""
    rows = [reader.attributes(scene, picture) for scene, picture in zip(scenes, pictures, strict=True)]
    mentioned = {name: [row[name] for row in rows if name in row] for name in ATTRIBUTES}
    return {name: share(sum(right), len(right)) for name, right in mentioned.items() if right}


def against_candidates(right: Tensor, scores: Tensor) -> dict[str, list]:
    """Accuracy of the best-scored of N candidates, N = 1, 2, 4, …, and how often any of the N is right.

    Candidates are cut into disjoint groups of N; the mean over the groups of a caption estimates what N candidates give
    without bias, and the mean over captions is reported. The intervals count each caption once.

    Args:
        right: bool [captions, candidates].
        scores: the higher the better, [captions, candidates].
    """
    captions, candidates = right.shape
    curve = {"candidates": [], "ranked": [], "ranked, 95 %": [], "oracle": [], "oracle, 95 %": []}
    for exponent in range(candidates.bit_length()):
        size = 2**exponent
        groups = candidates // size
        grouped, by = (x[:, : groups * size].unflatten(1, (groups, size)) for x in (right, scores))
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
        attributes: what `Reader.attributes` gives for every caption and candidate.
        scores: [captions, candidates].
    """
    result = {}
    for name in ATTRIBUTES:
        rows = [i for i, candidates in enumerate(attributes) if name in candidates[0]]
        if rows:
            right = torch.tensor([[row[name] for row in attributes[i]] for i in rows])
            result[name] = {"captions": len(rows)} | against_candidates(right, scores[rows])
    return result
