"""All measurements of a model, section by section; what is measured is in the report's file at once."""

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
from dalle import images
from dalle.data import Source, open_source, split
from dalle.data.shapes import Scene, ShapesPart, ShapesSource
from dalle.data.source import Subset
from dalle.evaluation import shapes
from dalle.evaluation.measures import likelihood, reconstruction, retrieval
from dalle.evaluation.pictures import PictureSet, Track, draw, first_and_best, look, silently, spaced
from dalle.evaluation.ranking import Gallery
from dalle.files import writable_directory, write_text
from dalle.generation.pipeline import Pipeline
from dalle.models.checkpoint import fingerprint
from dalle.runtime import choose_device

TRAINING, HELD_OUT, PLAIN = "training", "held-out", "training without skin tones"
REPORT = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures a model: reconstructions, losses, retrieval, and whether drawn pictures show what was asked for."""

    model: str | None = None
    """Directory of a trained model, or owner/name on the Hugging Face Hub; by default the model that comes along."""
    data: str = "emoji"
    """Captioned pictures: emoji, shapes, shapes:N, shapes-simple, or a folder."""
    out: Path = Path("evaluation")
    """Directory for evaluation.json and the plots."""
    captions: int = 200
    """At most so many pictures and captions of each part, evenly spaced."""
    candidates: int = 16
    """Pictures drawn for a caption, of which CLIP takes the best."""
    ranked: int = 512
    """Most candidates in the curve of accuracy against candidates, for drawn shapes."""
    ranked_captions: int = 48
    """Captions of each part for this curve."""
    seed: int = 0
    """Of the first picture drawn; the others have the numbers that follow."""
    font: str | None = None
    """Colour-emoji font, if the system's is not found."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""
    threads: int | None = None
    """CPU threads; by default as many as PyTorch chooses."""

    def __post_init__(self) -> None:
        counts = "captions", "candidates", "ranked", "ranked_captions"
        configs.check(self, "be at least 1", **{name: getattr(self, name) >= 1 for name in counts})
        configs.check(self, "be at least 1", threads=self.threads is None or self.threads >= 1)
        configs.check(self, "be in [0, 2^62)", seed=0 <= self.seed < 2**62)


class Report:
    """Sections by name, written whole whenever one is added."""

    def __init__(self, path: Path, conditions: dict) -> None:
        self.path, self.sections = path, {"conditions": conditions, "notes": [], "seconds": {}}
        self._began = time.monotonic()
        self._write()

    def add(self, section: str, content: dict) -> None:
        """Also takes the time since the last addition."""
        now = time.monotonic()
        seconds = self.sections["seconds"]
        seconds[section] = round(seconds.get(section, 0) + now - self._began, 1)
        self.sections[section] = content
        self._began = now
        self._write()

    def note(self, text: str) -> None:
        """What was left out, and why, in one line."""
        self.sections["notes"].append(text)

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.sections, indent=1, ensure_ascii=False) + "\n")


class Run(NamedTuple):
    """A model that is being measured: on what, and where the numbers go."""

    config: EvaluateConfig
    pipeline: Pipeline
    parts: dict[str, Source]
    """All pictures, by name of the part."""
    groups: dict[str, PictureSet]
    """Those of each part that are looked at."""
    report: Report
    track: Track

    def scenes(self, name: str, indices: Sequence[int]) -> list[Scene]:
        """What the captions of a part of the drawn shapes say."""
        part = self.parts[name]
        assert isinstance(part, ShapesPart)
        return [part.scene(i) for i in indices]

    def drawn(self, name: str) -> dict[str, Tensor]:
        """What is drawn for the captions of a part: the first candidates, and the best."""
        captions, config = self.groups[name].captions, self.config
        return first_and_best(self.pipeline, captions, config.candidates, config.seed, self.track, f"drawing, {name}")


def evaluate(config: EvaluateConfig, track: Track = silently) -> dict:
    """Writes `config.out`/evaluation.json, section by section, and returns what it holds. Raises UserError."""
    out = writable_directory(config.out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    choose_device(config.device)
    pipeline = Pipeline.from_pretrained(config.model, device=config.device)
    source = open_source(config.data, pipeline.dvae.config.image_size, font=config.font)
    parts = choose_parts(source, config.data)
    report = Report(out / REPORT, conditions(config, pipeline, parts))
    groups = {}
    for name, part in parts.items():
        group = look(pipeline.dvae, part, spaced(len(part), config.captions), track, f"pictures, {name}")
        if group.indices:
            groups[name] = group
        else:
            report.note(f"{name}: there are no pictures")

    report.add("dvae", {name: reconstruction(pipeline, group) for name, group in groups.items()})
    report.add("prior", {name: likelihood(pipeline, group) for name, group in groups.items()})
    if pipeline.clip is None:
        report.note("the model has no CLIP: retrieval, ranking and accuracy against candidates are left out")
    else:
        report.add("retrieval", retrieval(pipeline, groups))
    run = Run(config, pipeline, parts, groups, report, track)
    if isinstance(source, ShapesSource):
        measure_shapes(run)
    else:
        measure_ranks(run)
    return report.sections


def choose_parts(source: Source, data: str) -> dict[str, Source]:
    """The training and the held-out part, and for emoji the training part without skin tones."""
    training = split(source, "train")
    parts = {TRAINING: training, HELD_OUT: split(source, "heldout")}
    if data == "emoji":
        plain = [i for i in range(len(training)) if "skin tone" not in training.caption(i)]
        parts[PLAIN] = Subset(training, plain)
    return parts


def conditions(config: EvaluateConfig, pipeline: Pipeline, parts: dict[str, Source]) -> dict:
    """What was measured, where and with what."""
    info = dalle_kernels.info.collect()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = {"dvae": pipeline.dvae, "prior": pipeline.prior, "clip": pipeline.clip}
    return {
        "options": configs.to_dict(config),
        "fingerprints": {name: fingerprint(model) for name, model in models.items() if model is not None},
        "pictures of the source": {name: len(part) for name, part in parts.items()},
        "date": datetime.date.today().isoformat(),
        "machine": info["machine"],
        "processor": next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor()),
        "threads": torch.get_num_threads(),
        "versions": {"dalle-kernels": info["dalle_kernels"], "Python": info["python"], "PyTorch": info["torch"]},
    }


def measure_ranks(run: Run) -> None:
    """The ranks of a caption's picture, seen from what is drawn for it, its reconstruction and another's picture."""
    gallery = Gallery(run.parts[TRAINING], run.parts[HELD_OUT], run.track)
    section: dict[str, Any] = {"pictures": len(gallery.captions)}
    for name, group in run.groups.items():
        ranks = {kind: gallery.rank(group.captions, pictures) for kind, pictures in run.drawn(name).items()}
        if len({caption for caption, _ in gallery.known}) > 1:
            ranks["most alike training caption"] = gallery.rank_of_most_alike(group.captions)
        section[name] = ranks | {"reconstruction": gallery.rank(group.captions, group.copies)}
        run.report.add("ranks", section)


def measure_shapes(run: Run) -> None:
    """What drawn pictures show of their captions."""
    reader, accuracies = shapes.Reader(), {}
    for name, group in run.groups.items():
        scenes = run.scenes(name, group.indices)
        drawn = run.drawn(name)
        kinds = {"real pictures": group.images, "reconstructions": group.copies, **drawn}
        accuracies[name] = {kind: shapes.accuracy(reader, scenes, pictures) for kind, pictures in kinds.items()}
        run.report.add("shapes", accuracies)
    if run.pipeline.clip is not None:
        measure_candidates(run, reader)


def measure_candidates(run: Run, reader: shapes.Reader) -> None:
    """How the accuracy of the best candidate by CLIP grows with their number."""
    curves, most, seed = {}, run.config.ranked, run.config.seed
    for name, group in run.groups.items():
        chosen = spaced(len(group.indices), run.config.ranked_captions)
        captions = [group.captions[i] for i in chosen]
        scenes = run.scenes(name, [group.indices[i] for i in chosen])
        drawn = draw(run.pipeline, captions, most, seed, run.track, f"{most} candidates, {name}")
        right, scores = [], []
        for scene, row in zip(scenes, drawn, strict=True):
            right.append([reader.attributes(scene, images.to_tensor(drawing.image)) for drawing in row])
            scores.append([drawing.score for drawing in row])
        curves[name] = shapes.curves(right, torch.tensor(scores))
        run.report.add("candidates", curves)
