"""The training loop that the dVAE, the prior and CLIP share."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dalle import config as configs
from dalle.errors import UserError
from dalle.extras import extras
from dalle.files import writable_directory
from dalle.runtime import OnStep, Progress, choose_device
from dalle.training import run_state
from dalle.training.optimizer import average
from dalle.training.run_state import State

PER_SESSION = {"out", "font", "steps", "minutes", "threads", "device", "precision", "resume"} | {
    "sample_every", "save_every", "report_every", "tensorboard"
}  # fields that may differ between a run and its resumption  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every kind of training can be told."""

    out: Path
    """Directory of the model; checkpoints and samples go there too."""
    steps: int = 5000
    """Updates to make. Schedules run over them, so resuming with another number bends the schedules."""
    minutes: float | None = None
    """Time budget that replaces `steps`: schedules run over the time, so that they finish whatever the machine."""
    batch_size: int = 32
    """Pictures per update."""
    seed: int = 0
    """Of the initial weights, the order of the pictures and all noise; below 2^31."""
    device: str = "cpu"
    """Where to train, as PyTorch names it: cpu, cuda, cuda:1."""
    threads: int | None = None
    """CPU threads; by default as many as PyTorch chooses."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of convolutions and matrix products; auto is bfloat16 where the machine computes in it."""
    resume: bool = False
    """Go on from the checkpoint in `out`."""
    save_every: int = 1000
    """Updates between checkpoints; one is also written at the end and on Ctrl-C."""
    sample_every: int = 1000
    """Updates between evaluations on held-out pictures, each with a picture in `out`/samples; 0 for none."""
    report_every: int = 10
    """Updates between progress reports; a report gives means over them."""
    tensorboard: bool = False
    """Write curves for TensorBoard to `out`/curves."""

    def __post_init__(self) -> None:
        counts = "steps", "batch_size", "save_every", "report_every"
        configs.check(self, "be at least 1", **{name: getattr(self, name) >= 1 for name in counts})
        configs.check(self, "be at least 0", sample_every=self.sample_every >= 0)
        configs.check(self, "be positive", minutes=self.minutes is None or self.minutes > 0)
        configs.check(self, "be in [0, 2^31)", seed=0 <= self.seed < 2**31)


@dataclass(frozen=True)
class Result:
    """What training came to."""

    step: int
    """Updates done, those before a resume included."""
    interrupted: bool
    """Stopped by Ctrl-C or SIGTERM; a checkpoint was written."""
    evaluation: dict[str, float]
    """The last one on held-out pictures; empty if none was made."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Pictures that could not be used, as (name, reason)."""


class Task(Protocol):
    """What differs between the dVAE, the prior and CLIP."""

    name: str
    model: Any
    optimizer: torch.optim.Optimizer
    average_decay: float
    max_grad_norm: float

    def learning_rate(self, step: int, fraction: float) -> float: ...
    def losses(self, step: int, fraction: float) -> dict[str, Tensor]:
        """The "loss" to minimise and what else to report, for the batch of a step."""

    def evaluate(self, model: Any) -> dict[str, float]:
        """Numbers on held-out pictures; empty if there are none."""

    def draw_samples(self, model: Any, path: Path) -> None:
        """Writes a PNG that shows what the model can do."""

    def write_model(self, model: Any, done: bool) -> None:
        """Writes the model into the model directory; `done` says that training has come to its end."""


def train(task: Task, config: TrainConfig, identity: dict, on_step: OnStep | None = None) -> Result:
    """Trains until steps or minutes are used up or a signal comes, and leaves a checkpoint and the averaged model.

    Raises:
        UserError: the directory cannot be written, holds another run or (to resume) none, or the loss is not finite.
    """
    path = run_path(config, task.name)
    identity = identity | {k: v for k, v in configs.to_dict(config).items() if k not in PER_SESSION}
    state = State(task.model, average(task.model, task.average_decay), task.optimizer)
    if config.resume:
        run_state.load(path, state, identity)

    def save() -> None:
        if not all(p.isfinite().all() for p in state.model.parameters()):
            raise UserError(f"the weights are no longer finite at step {state.step}: try a smaller --lr")
        task.write_model(state.average.module, _fraction(config, state) == 1)
        run_state.save(path, state, identity)

    began = time.monotonic() - state.elapsed
    report, last = _Reporter(config, on_step), {}
    with _signals() as interrupted, report:
        while (fraction := _fraction(config, state)) < 1 and not interrupted():
            losses = _update(task, config, state, fraction)
            state.step += 1
            state.elapsed = time.monotonic() - began
            fraction, evaluation = _fraction(config, state), {}
            if fraction == 1 or (config.sample_every and state.step % config.sample_every == 0):
                last = evaluation = _evaluate(task, config, state)
            report(state, fraction, losses, evaluation)
            if state.step % config.save_every == 0 and fraction < 1:
                save()
        if not last and not interrupted():  # resumed with nothing left to do
            last = _evaluate(task, config, state)
        save()
        return Result(state.step, interrupted(), last)


def autocast(config: TrainConfig) -> AbstractContextManager:
    """The context in which the forward pass runs."""
    device = torch.device(config.device).type
    wanted = config.precision == "bfloat16" or (config.precision == "auto" and _computes_bfloat16(device))
    return torch.autocast(device, torch.bfloat16) if wanted else nullcontext()


def prepare(config: TrainConfig, name: str) -> torch.device:
    """What comes before any work: checks the directory, sets threads and the seed of the weights, finds the device."""
    path = run_path(config, name)
    writable_directory(config.out)
    if config.resume and not path.exists():
        raise UserError(f"{path} does not exist, so there is nothing to resume: leave --resume out")
    if not config.resume and path.exists():
        raise UserError(f"{path} holds a training run: add --resume to go on with it, or delete it to start anew")
    if config.threads is not None:
        if config.threads < 1:
            raise UserError(f"threads must be at least 1, not {config.threads}")
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    return choose_device(config.device)


def run_path(config: TrainConfig, name: str) -> Path:
    """The checkpoint of the training of `name` in a model directory."""
    return Path(config.out) / f"{name}.run.safetensors"


def _computes_bfloat16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _fraction(config: TrainConfig, state: State) -> float:
    done = state.step / config.steps if config.minutes is None else state.elapsed / (60 * config.minutes)
    return min(done, 1.0)


def _update(task: Task, config: TrainConfig, state: State, fraction: float) -> dict[str, Tensor]:
    for group in state.optimizer.param_groups:
        group["lr"] = task.learning_rate(state.step, fraction)
    with autocast(config):
        losses = task.losses(state.step, fraction)
    state.optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    if task.max_grad_norm < math.inf:
        nn.utils.clip_grad_norm_(state.model.parameters(), task.max_grad_norm)
    state.optimizer.step()
    state.average.update_parameters(state.model)
    return {name: value.detach() for name, value in losses.items()}


def _evaluate(task: Task, config: TrainConfig, state: State) -> dict[str, float]:
    model = state.average.module.eval()
    with torch.inference_mode(), autocast(config):
        task.draw_samples(model, writable_directory(config.out / "samples") / f"{task.name}-{state.step:07}.png")
        return task.evaluate(model)


class _Reporter:
    """Gathers losses and calls `on_step` and TensorBoard with their means."""

    def __init__(self, config: TrainConfig, on_step: OnStep | None) -> None:
        self.config, self.on_step = config, on_step
        self.since, self.losses = time.monotonic(), []
        self.curves = None
        if config.tensorboard:
            with extras():
                from torch.utils.tensorboard import SummaryWriter

            self.curves = SummaryWriter(str(config.out / "curves"))

    def __enter__(self) -> "_Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self.curves:
            self.curves.close()

    def __call__(self, state: State, fraction: float, losses: dict[str, Tensor], evaluation: dict[str, float]) -> None:
        self.losses.append(losses)
        if fraction < 1 and not evaluation and state.step % self.config.report_every:
            return
        count, seconds = len(self.losses), max(time.monotonic() - self.since, 1e-9)
        metrics = _means(self.losses)
        if not math.isfinite(metrics["loss"]):
            raise UserError(f"the loss became {metrics['loss']} at step {state.step}: try a smaller --lr")
        self.since, self.losses = time.monotonic(), []
        if self.curves:
            for name, value in [*metrics.items(), *((f"heldout {name}", x) for name, x in evaluation.items())]:
                self.curves.add_scalar(name, value, state.step)
        if self.on_step:
            left = state.elapsed / fraction * (1 - fraction) if fraction else math.inf
            speed = count * self.config.batch_size / seconds
            self.on_step(Progress(state.step, fraction, metrics, speed, left, evaluation))


def _means(losses: list[dict[str, Tensor]]) -> dict[str, float]:
    return {
        name: torch.stack([entry[name] for entry in losses]).mean().item() for name in (losses[0] if losses else ())
    }


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; a second one interrupts at once, as usual."""
    received = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, remember)
    except ValueError:
        pass  # not in the main thread: signals are somebody else's
    try:
        yield lambda: bool(received)
    finally:
        restore()
