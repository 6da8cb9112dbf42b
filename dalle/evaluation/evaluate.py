"""The evaluation of a model, section by section; each section is written to the report as soon as it is complete."""

import datetime
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dalle_kernels.info
from dalle import config as configs
from dalle.data import Source, open_source, split
from dalle.data.shapes import Scene, ShapesPart, ShapesSource
from dalle.data.source import Subset
from dalle.evaluation import shapes
from dalle.evaluation.evaluation_set import (
    EvaluationSet,
    Track,
    build_evaluation_set,
    evenly_spaced,
    first_and_best,
    generate,
    no_progress,
)
from dalle.evaluation.measures import likelihood, reconstruction, retrieval
from dalle.evaluation.ranking import Gallery
from dalle.files import writable_directory, write_text
from dalle.generation.pipeline import Pipeline
from dalle.images import to_tensor
from dalle.models.checkpoint import fingerprint
from dalle.runtime import choose_device

TRAINING, HELD_OUT, PLAIN = "training", "held-out", "training without skin tones"
REPORT = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluates a model: reconstructions, likelihood, retrieval, and whether generated images match their captions."""

    model: str | None = None
    """Directory of a trained model, or owner/name on the Hugging Face Hub; by default the shipped model."""
    data: str = "emoji"
    """Captioned images: emoji, shapes, shapes:N, shapes-simple, or a folder."""
    out: Path = Path("evaluation")
    """Directory for evaluation.json and the plots."""
    captions: int = 200
    """Maximum number of captioned images per split, evenly spaced."""
    candidates: int = 16
    """Images to generate per caption, of which the CLIP chooses the best."""
    ranked: int = 512
    """Maximum number of candidates in the curve of accuracy against candidates (shapes only)."""
    ranked_captions: int = 48
    """Captions per split for that curve."""
    seed: int = 0
    """Seed of the first generated image; the others use the numbers that follow."""
    font: str | None = None
    """Colour-emoji font, if the system's is not found."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""

    def __post_init__(self) -> None:
        counts = "captions", "candidates", "ranked", "ranked_captions"
        configs.check(self, "be at least 1", **{name: getattr(self, name) >= 1 for name in counts})
        configs.check(self, "be at least 1", threads=self.threads is None or self.threads >= 1)
        configs.check(self, "be in [0, 2^62)", seed=0 <= self.seed < 2**62)


class Report:
    """Named sections, written to a JSON file whenever one is added."""

    def __init__(self, path: Path, conditions: dict) -> None:
        self.path, self.sections = path, {"conditions": conditions, "notes": [], "seconds": {}}
        self._began = time.monotonic()
        self._write()

    def add(self, section: str, content: dict) -> None:
        """Sets a section, and adds the time since the last call to its seconds."""
        now = time.monotonic()
        seconds = self.sections["seconds"]
        seconds[section] = round(seconds.get(section, 0) + now - self._began, 1)
        self.sections[section] = content
        self._began = now
        self._write()

    def note(self, text: str) -> None:
        """Records what was left out, and why, in one line."""
        self.sections["notes"].append(text)

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.sections, indent=1, ensure_ascii=False) + "\n")


class Evaluation(NamedTuple):
    """The model under evaluation, its data, and the report."""

    config: EvaluateConfig
    pipeline: Pipeline
    parts: dict[str, Source]
    """The splits, by name."""
    sets: dict[str, EvaluationSet]
    """The images of each split to evaluate on."""
    report: Report
    track: Track

    def scenes(self, name: str, indices: Sequence[int]) -> list[Scene]:
        """The scenes of images of a split of the shapes."""
        part = self.parts[name]
        assert isinstance(part, ShapesPart)
        return [part.scene(i) for i in indices]

    def generated(self, name: str) -> dict[str, Tensor]:
        """Images generated for the captions of a split, uint8 [n, 3, S, S]: the first candidates, and the best."""
        captions, config, title = self.sets[name].captions, self.config, f"generation, {name}"
        return first_and_best(self.pipeline, captions, config.candidates, config.seed, self.track, title)


def evaluate(config: EvaluateConfig, track: Track = no_progress) -> dict:
    """Evaluates a model; writes `config.out`/evaluation.json section by section and returns its content.

    Raises UserError if the model, the data or the output directory cannot be used.
    """
    out = writable_directory(config.out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    choose_device(config.device)
    pipeline = Pipeline.from_pretrained(config.model, device=config.device)
    source = open_source(config.data, pipeline.dvae.config.image_size, font=config.font)
    parts = choose_parts(source, config.data)
    report = Report(out / REPORT, conditions(config, pipeline, parts))
    sets = {}
    for name, part in parts.items():
        indices = evenly_spaced(len(part), config.captions)
        images = build_evaluation_set(pipeline.dvae, part, indices, track, f"images, {name}")
        if images.indices:
            sets[name] = images
        else:
            report.note(f"{name}: there are no images")

    report.add("dvae", {name: reconstruction(pipeline, images) for name, images in sets.items()})
    report.add("prior", {name: likelihood(pipeline, images) for name, images in sets.items()})
    if pipeline.clip is None:
        report.note("the model has no CLIP: retrieval, ranking and accuracy against candidates are left out")
    else:
        report.add("retrieval", retrieval(pipeline, sets))
    evaluation = Evaluation(config, pipeline, parts, sets, report, track)
    if isinstance(source, ShapesSource):
        evaluate_shapes(evaluation)
    else:
        evaluate_ranks(evaluation)
    return report.sections


def choose_parts(source: Source, data: str) -> dict[str, Source]:
    """The training and held-out splits, and for emoji also the training split without skin tones."""
    training = split(source, "train")
    parts = {TRAINING: training, HELD_OUT: split(source, "heldout")}
    if data == "emoji":
        plain = [i for i in range(len(training)) if "skin tone" not in training.caption(i)]
        parts[PLAIN] = Subset(training, plain)
    return parts


def conditions(config: EvaluateConfig, pipeline: Pipeline, parts: dict[str, Source]) -> dict:
    """The conditions of the evaluation: options, weights, data, machine and versions."""
    info = dalle_kernels.info.collect()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = {"dvae": pipeline.dvae, "prior": pipeline.prior, "clip": pipeline.clip}
    return {
        "options": configs.to_dict(config),
        "fingerprints": {name: fingerprint(model) for name, model in models.items() if model is not None},
        "images in the source": {name: len(part) for name, part in parts.items()},
        "date": datetime.date.today().isoformat(),
        "machine": info["machine"],
        "processor": next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor()),
        "threads": torch.get_num_threads(),
        "versions": {"dalle-kernels": info["dalle_kernels"], "Python": info["python"], "PyTorch": info["torch"]},
    }


def evaluate_ranks(evaluation: Evaluation) -> None:
    """Ranks a caption's image by similarity to generated images, to its reconstruction, and to a baseline's image."""
    gallery = Gallery(evaluation.parts[TRAINING], evaluation.parts[HELD_OUT], evaluation.track)
    section: dict[str, Any] = {"images": len(gallery.captions)}
    for name, real in evaluation.sets.items():
        ranks = {kind: gallery.rank(real.captions, images) for kind, images in evaluation.generated(name).items()}
        if len({caption for caption, _ in gallery.training}) > 1:
            ranks["nearest training caption"] = gallery.rank_of_nearest_caption(real.captions)
        section[name] = ranks | {"reconstruction": gallery.rank(real.captions, real.reconstructions)}
        evaluation.report.add("ranks", section)


def evaluate_shapes(evaluation: Evaluation) -> None:
    """Measures which attributes of their captions images of shapes show."""
    parser, accuracies = shapes.CachingParser(), {}
    for name, real in evaluation.sets.items():
        scenes = evaluation.scenes(name, real.indices)
        generated = evaluation.generated(name)
        kinds = {"real images": real.images, "reconstructions": real.reconstructions, **generated}
        accuracies[name] = {kind: shapes.accuracy(parser, scenes, images) for kind, images in kinds.items()}
        evaluation.report.add("shapes", accuracies)
    if evaluation.pipeline.clip is not None:
        evaluate_candidates(evaluation, parser)


def evaluate_candidates(evaluation: Evaluation, parser: shapes.CachingParser) -> None:
    """Measures the accuracy of the best candidate by CLIP against the number of candidates."""
    config, pipeline, curves = evaluation.config, evaluation.pipeline, {}
    for name, real in evaluation.sets.items():
        chosen = evenly_spaced(len(real.indices), config.ranked_captions)
        captions = [real.captions[i] for i in chosen]
        scenes = evaluation.scenes(name, [real.indices[i] for i in chosen])
        title = f"{config.ranked} candidates, {name}"
        rows = generate(pipeline, captions, config.ranked, config.seed, evaluation.track, title)
        correct, scores = [], []
        for scene, row in zip(scenes, rows, strict=True):
            correct.append([parser.attributes(scene, to_tensor(result.image)) for result in row])
            scores.append([result.score for result in row])
        curves[name] = shapes.curves(correct, torch.tensor(scores))
        evaluation.report.add("candidates", curves)
