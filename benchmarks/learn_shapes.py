"""Does it learn? Trains a tiny dVAE and a tiny prior on drawn shapes for some minutes on two CPU cores, draws every
caption, those of held-out combinations of colour and shape too, and reads the pictures back.

    python benchmarks/learn_shapes.py --minutes 9 --out runs/learn_shapes

Training sees seen combinations only, in both stages. Whether a picture is right is told by the exact parser of
`dalle.data.shapes_parser`, which also reads the real pictures and what the dVAE leaves of them: the former bounds what
the parser can tell, the latter what any prior could reach with these codes.
"""

import datetime
import json
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import torch
import tyro
from PIL import Image
from torch import Tensor

import dalle_kernels.info
from dalle import config as configs
from dalle import images
from dalle.cli.demo import DemoConfig, training
from dalle.cli.progress import shown
from dalle.data.shapes import HELD_OUT, MAX_OFFSET, Scene, all_scenes, caption, draw
from dalle.data.shapes_parser import compare, parse
from dalle.dvae import DiscreteVAEConfig
from dalle.errors import UserError
from dalle.files import writable_directory, write_text
from dalle.pipeline import Pipeline
from dalle.training.loop import Result, TrainConfig, run_path
from dalle.training.tokens import TokenizeConfig, tokenize
from dalle.training.train_dvae import evaluate, train_dvae
from dalle.training.train_prior import train_prior

DVAE_DATA, DATA = "shapes:10000", "shapes-simple:4000"  # for the dVAE up to three objects a picture: less white
DVAE_SHARE = 0.63  # of the time
# Against the demo's dVAE: many short steps, fewer codes, and a KL term that is strong from the start, without which
# nearly white pictures end in one code for everything.
DVAE_SETTINGS = dict(
    data=DVAE_DATA,
    model=replace(DiscreteVAEConfig.preset("tiny"), vocab=128),
    batch_size=8,
    lr=2.5e-3,
    beta=13.0,
    beta_warmup=0.0,
)
COUNT = 324  # pictures drawn of each part: one for each of its 324 seen captions, three for each of its 108 held-out
BATCH = 54
SHOWN = 14  # scenes in the sample grid
ATTRIBUTES = ("colour", "shape", "position", "size", "joint")
PARTS = ("seen", "held-out")
STAGES = {"real": "real pictures", "reconstructed": "dVAE reconstructions", "drawn": "drawn from the caption"}


def main(minutes: float = 9.0, out: Path = Path("runs/learn_shapes"), seed: int = 0, threads: int = 2) -> int:
    """Trains on drawn shapes, draws captions with seen and held-out combinations, and counts what is right.

    Args:
        minutes: time for training both models; goes on from an earlier run in `out`.
        out: directory for the model and for learn_shapes.json, learn_shapes.md and learn_shapes.png.
        seed: of training, of the pictures shown to the parser, and of the drawings.
        threads: of PyTorch; on a processor that others use too, 1 is faster than 2.
    """
    out = writable_directory(out)
    trained = train(minutes, out, seed, threads)
    if trained is None:
        print("stopped, and what was learned is saved: run the same command again to go on", file=sys.stderr)
        return 130
    report, grid = measure(Pipeline.from_pretrained(out), seed)
    report = {"conditions": conditions(), **trained, **report}
    images.save(grid, out / "learn_shapes.png")
    write_text(out / "learn_shapes.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "learn_shapes.md", markdown(report))
    print(markdown(report))
    return 0


def train(minutes: float, out: Path, seed: int, threads: int) -> dict | None:
    """Trains both models, and says how; None if it was interrupted."""
    dvae, prior = training(DemoConfig(out=out, minutes=minutes, data="shapes"), DATA)
    common = dict(seed=seed, threads=threads)
    dvae = replace(dvae, minutes=minutes * DVAE_SHARE, **DVAE_SETTINGS, **common)
    prior = replace(prior, minutes=minutes * (1 - DVAE_SHARE), **common)
    began = time.process_time()
    dvae_result = run(train_dvae, dvae, "dvae")
    if dvae_result.interrupted:
        return None
    with shown("pictures to codes") as on_step:
        tokenize(TokenizeConfig(out=out, data=DATA), on_step=on_step)
    prior_result = run(train_prior, prior, "prior")
    if prior_result.interrupted:
        return None
    return {
        "training": {
            "minutes": minutes,
            "processor minutes": (time.process_time() - began) / 60,
            "steps": {"dvae": dvae_result.step, "prior": prior_result.step},
            "settings": {"dvae": configs.to_dict(dvae), "prior": configs.to_dict(prior)},
        }
    }


def run(stage: Callable[..., Result], config: TrainConfig, name: str) -> Result:
    """Trains one model, on from where an earlier run left it."""
    with shown(name) as on_step:
        return stage(replace(config, resume=run_path(config, name).exists()), on_step=on_step)


def measure(pipeline: Pipeline, seed: int) -> tuple[dict, Image.Image]:
    """Accuracy of every stage on both parts with the models' own numbers beside it, and the grid of samples."""
    report, rows, labels = {"accuracy": {}, "models": {}}, [], []
    for part in PARTS:
        scenes = choose_scenes(part, seed)
        real = draw_scenes(scenes, pipeline.dvae.config.image_size, seed)
        with torch.inference_mode():
            copies = torch.cat([pipeline.dvae.reconstruct(batch) for batch in real.split(BATCH)])
        drawn = draw_captions(pipeline, scenes, seed)
        stages = {"real": real, "reconstructed": images.to_uint8(copies), "drawn": drawn}
        report["accuracy"][part] = {stage: accuracy(scenes, pictures) for stage, pictures in stages.items()}
        report["models"][part] = describe(pipeline, scenes, real)
        rows += [list(pictures[:SHOWN]) for pictures in stages.values()]
        labels += [f"{part} combinations: {STAGES[stage]}" for stage in stages]
    return report, images.grid(rows, labels, scale=2)


def choose_scenes(part: str, seed: int) -> list[Scene]:
    """COUNT scenes of one object in random order, each caption of the part equally often."""
    held_out = part == "held-out"
    scenes = [s for s in all_scenes("single") if ((s.objects[0].colour, s.objects[0].shape) in HELD_OUT) == held_out]
    random.Random(f"order {seed}").shuffle(scenes)
    return scenes * (COUNT // len(scenes))


def draw_scenes(scenes: list[Scene], size: int, seed: int) -> Tensor:
    """Real pictures of scenes at random offsets, other ones than in training, uint8 [n, 3, size, size]."""
    rng = random.Random(f"offsets {seed}")
    offsets = [(rng.uniform(-MAX_OFFSET, MAX_OFFSET), rng.uniform(-MAX_OFFSET, MAX_OFFSET)) for _ in scenes]
    return torch.stack([draw(scene, size, offset) for scene, offset in zip(scenes, offsets)])


def draw_captions(pipeline: Pipeline, scenes: list[Scene], seed: int) -> Tensor:
    """What the model draws for the captions, one picture each, uint8 [n, 3, S, S].

    Every picture has its own seed, unlike in Pipeline.generate, so that the draws are independent.
    """
    text = encode(pipeline, scenes)
    seeds = torch.arange(seed * len(scenes), (seed + 1) * len(scenes))
    drawn = [pipeline.prior.generate(t, seeds=s) for t, s in zip(text.split(BATCH), seeds.split(BATCH))]
    with torch.inference_mode():
        return torch.cat([images.to_uint8(pipeline.dvae.decode(codes)) for codes in drawn])


def encode(pipeline: Pipeline, scenes: list[Scene]) -> Tensor:
    return pipeline.prior.pack_text([pipeline.tokenizer.encode(caption(scene)) for scene in scenes])


@torch.inference_mode()
def describe(pipeline: Pipeline, scenes: list[Scene], real: Tensor) -> dict[str, float]:
    """PSNR in dB, codes in use and nats per token on real pictures that training did not see."""
    codes = pipeline.dvae.codes(real)
    losses = pipeline.prior.loss(encode(pipeline, scenes), codes.flatten(1))
    found = evaluate(pipeline.dvae, list(real))
    return {
        "PSNR, dB": found["psnr"],
        "codes in use": found["codes used"],
        "nats per text token": losses["text"].item(),
        "nats per image token": losses["image"].item(),
    }


def accuracy(scenes: list[Scene], pictures: Tensor) -> dict[str, dict]:
    """How many pictures have each attribute right, "joint" all of them, with 95 % intervals."""
    right = Counter()
    for scene, picture in zip(scenes, pictures, strict=True):
        found = compare(scene, parse(picture))
        right.update(name for name, same in (found | {"joint": all(found.values())}).items() if same)
    count = len(scenes)
    return {
        name: {"right": right[name], "of": count, "accuracy": right[name] / count, "95 %": wilson(right[name], count)}
        for name in ATTRIBUTES
    }


def wilson(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a binomial proportion (Wilson 1927)."""
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = (right + z2 / 2) / (count + z2)
    half = (z2 * (right * (count - right) / count + z2 / 4)) ** 0.5 / (count + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def conditions() -> dict[str, str]:
    """Where and with what this ran."""
    info = dalle_kernels.info.collect()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return {
        "date": datetime.date.today().isoformat(),
        "machine": info["machine"],
        "processor": next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor()),
        "threads": str(torch.get_num_threads()),
        "instruction set": str(info["build"].get("cpu_isa_active")),
        "versions": f"dalle-kernels {info['dalle_kernels']}, Python {info['python']}, PyTorch {info['torch']}",
        "command": " ".join(["python", *sys.argv]),
    }


def markdown(report: dict) -> str:
    """The report as a page."""
    trained, models = report["training"], report["models"]
    steps = trained["steps"]
    lines = ["# Learning drawn shapes", ""]
    lines += [f"- {name}: {value}" for name, value in report["conditions"].items()]
    lines += [
        f"- training: {trained['minutes']:g} minutes ({trained['processor minutes']:.1f} of processor time) on seen "
        f"combinations; dVAE {steps['dvae']} steps on {DVAE_DATA}, prior {steps['prior']} steps on {DATA}",
        f"- pictures: {COUNT} for each row, one candidate each, temperature 1, a seed of its own for each",
        "",
        "Share of pictures that the parser reads as their caption says, in %, with the 95 % Wilson interval. "
        "It covers the drawing of pictures with this one trained model, not training anew.",
        "",
        _row(["combinations", "pictures", *ATTRIBUTES]),
        _row(["---"] * (2 + len(ATTRIBUTES))),
    ]
    for part, stages in report["accuracy"].items():
        for stage, found in stages.items():
            lines.append(_row([part, STAGES[stage], *(_percent(found[name]) for name in ATTRIBUTES)]))
    lines += ["", "The models on the same real pictures, which neither was trained on:", ""]
    names = list(models["seen"])
    lines += [_row(["combinations", *names]), _row(["---"] * (1 + len(names)))]
    lines += [_row([part, *(f"{value:.4g}" for value in models[part].values())]) for part in models]
    lines += ["", "The first pictures of each row:", "", "![samples](learn_shapes.png)"]
    return "\n".join(lines) + "\n"


def _percent(found: dict) -> str:
    low, high = found["95 %"]
    return f"{100 * found['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
