"""Trains a tiny model on synthetic shapes, for minutes on two CPU cores, and evaluates the images that it generates for
seen and for held-out combinations of colour and shape.

    python recipes/learn_shapes.py --minutes 10 --out runs/learn_shapes

All parts are trained on seen combinations only. `dalle.evaluation` describes the measures. The parser also reads the
real images and their reconstructions: the former bound what it can measure, the latter what any prior could reach with
these codes.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tyro

from dalle import config as configs
from dalle.cli.evaluate import track
from dalle.cli.progress import shown
from dalle.errors import UserError
from dalle.evaluation.evaluate import EvaluateConfig, evaluate
from dalle.evaluation.plots import plot
from dalle.evaluation.table import table
from dalle.extras import MissingExtra
from dalle.files import writable_directory, write_text
from dalle.models.dvae import DiscreteVAEConfig
from dalle.models.prior import PriorConfig
from dalle.training.loop import Result, TrainConfig, checkpoint_path
from dalle.training.tokens import TokenizeConfig, tokenize
from dalle.training.train_clip import TrainCLIPConfig, train_clip
from dalle.training.train_dvae import TrainDVAEConfig, train_dvae
from dalle.training.train_prior import TrainPriorConfig, train_prior

DATA = "shapes:10000"
# Many short steps, fewer codes, and a KL term that is strong from the start. Without it, the codebook collapses to a
# single code on mostly white images.
DVAE_SETTINGS = dict(
    data=DATA,
    model=replace(DiscreteVAEConfig.preset("tiny"), vocab=128),
    batch_size=8,
    lr=2.5e-3,
    beta=13.0,
    beta_warmup=0.0,
)
# A narrow model without BPE dropout, because a minute on a CPU is only a few epochs.
PRIOR_SETTINGS = dict(
    model=replace(PriorConfig.preset("tiny"), text_len=24, heads=4), batch_size=16, lr=2e-3, bpe_dropout=0.0
)


def main(
    minutes: float = 10.0,
    dvae_share: float = 0.6,
    clip_share: float = 0.1,
    out: Path = Path("runs/learn_shapes"),
    captions: int = 200,
    ranked: int = 512,
    seed: int = 0,
    threads: int = 2,
) -> int:
    """Trains on synthetic shapes, and evaluates on seen and held-out combinations.

    Args:
        minutes: time for training; resumes an earlier run in `out`.
        dvae_share: fraction of the time for the dVAE.
        clip_share: fraction of the time for CLIP; the rest is for the prior.
        out: directory for the model, learn_shapes.json, learn_shapes.md and plots.
        captions: maximum number of captioned images per split to evaluate on.
        ranked: maximum number of candidates in the curve of accuracy against candidates.
        seed: seed of the training and of the generated images.
        threads: CPU threads; on a busy machine, 1 is faster than 2.
    """
    if min(dvae_share, clip_share) <= 0 or dvae_share + clip_share >= 1:
        raise UserError(f"the shares must be positive and leave time for the prior, not {dvae_share} and {clip_share}")
    evaluation = EvaluateConfig(
        model=str(out), data=DATA, out=out, captions=captions, ranked=ranked, seed=seed, threads=threads
    )
    out = writable_directory(out)
    shares = {"dvae": dvae_share, "clip": clip_share, "prior": 1 - dvae_share - clip_share}
    trained = train({name: minutes * share for name, share in shares.items()}, out, seed, threads)
    if trained is None:
        print("stopped; checkpoints are saved. Run the same command again to resume", file=sys.stderr)
        return 130
    report = {"command": " ".join(["python", *sys.argv]), "training": trained, **evaluate(evaluation, track)}
    write_text(out / "learn_shapes.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "learn_shapes.md", page(report))
    print(page(report))
    try:
        plot(report, out)
    except MissingExtra as error:
        print(f"no plots: {error}", file=sys.stderr)
    return 0


def train(minutes: dict[str, float], out: Path, seed: int, threads: int) -> dict | None:
    """Trains all parts; returns times, steps and settings, or None if it was interrupted."""
    common = dict(out=out, seed=seed, threads=threads)
    stages = {
        "dvae": (train_dvae, TrainDVAEConfig(minutes=minutes["dvae"], **DVAE_SETTINGS, **common)),
        "clip": (train_clip, TrainCLIPConfig(minutes=minutes["clip"], data=DATA, **common)),
        "prior": (train_prior, TrainPriorConfig(minutes=minutes["prior"], **PRIOR_SETTINGS, **common)),
    }
    began, steps = time.process_time(), {}
    for name, (stage, config) in stages.items():
        result = run(stage, config, name)
        if result.interrupted:
            return None
        steps[name] = result.step
        if name == "dvae":
            with shown("tokenize") as on_step:
                tokenize(TokenizeConfig(out=out, data=DATA), on_step=on_step)
    return {
        "minutes": minutes,
        "processor minutes": (time.process_time() - began) / 60,
        "steps": steps,
        "settings": {name: configs.to_dict(config) for name, (_, config) in stages.items()},
    }


def run(stage: Callable[..., Result], config: TrainConfig, name: str) -> Result:
    """Trains one part, from its checkpoint if there is one."""
    with shown(name) as on_step:
        return stage(replace(config, resume=checkpoint_path(config, name).exists()), on_step=on_step)


def page(report: dict) -> str:
    """A summary of the report, as Markdown."""
    trained, conditions = report["training"], report["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    stages = ", ".join(f"{name} {trained['minutes'][name]:g} min ({n} steps)" for name, n in trained["steps"].items())
    lines = [
        "# Learning synthetic shapes",
        "",
        f"- command: {report['command']}",
        f"- {conditions['date']}, {conditions['processor']}, {conditions['threads']} threads, {versions}",
        f"- training on seen combinations: {stages}; {trained['processor minutes']:.1f} minutes of processor time",
        "- training: seen combinations of colour and shape; held-out: combinations that never occur in training",
        "- in brackets: 95 % intervals for this trained model; they do not cover retraining",
    ]
    return "\n".join([*lines, "", "```", table(report), "```", ""])


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
