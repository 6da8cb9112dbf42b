"""The training loop shared by the dVAE, its decoder, the prior and CLIP."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
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
from dalle.files import SAMPLES, sole_writer, writable_directory
from dalle.models.checkpoint import fingerprint
from dalle.runtime import OnStep, Progress, choose_device
from dalle.training import checkpoint
from dalle.training.checkpoint import TrainingState
from dalle.training.optimizer import ema

MAY_CHANGE_ON_RESUME = {"out", "font", "steps", "minutes", "threads", "device", "precision", "resume"} | {
    "eval_every", "save_every", "log_every", "tensorboard", "init"
}  # fields of the configuration  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options common to all training runs."""

    out: Path
    """Directory of the model; checkpoints and samples are written there too."""
    init: str | None = None
    """Start from the weights of this model, whose configuration is kept: a directory, owner/name on the Hugging Face
    Hub, or "shipped"."""
    steps: int = 5000
    """Training steps. The schedules run over them, so changing it on resume rescales the schedules."""
    minutes: float | None = None
    """Time budget in place of `steps`; the schedules run over the time, so that they finish on any machine."""
    batch_size: int = 32
    """Images per step."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and all noise; below 2^31."""
    device: str = "cpu"
    """Where to train, as PyTorch names it: cpu, cuda, cuda:1."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of convolutions and matrix products; auto is bfloat16 if the hardware supports it."""
    resume: bool = False
    """Resume from the checkpoint in `out`."""
    save_every: int = 1000
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    eval_every: int = 1000
    """Steps between evaluations on held-out images, each with a grid of samples in `out`/samples; 0 for none."""
    log_every: int = 10
    """Steps between log entries, whose values are means over these steps."""
    tensorboard: bool = False
    """Write TensorBoard logs to `out`/curves."""

    def __post_init__(self) -> None:
        """Raises UserError for invalid fields."""
        counts = "steps", "batch_size", "save_every", "log_every"
        configs.check(self, "be at least 1", **{name: getattr(self, name) >= 1 for name in counts})
        configs.check(self, "be at least 0", eval_every=self.eval_every >= 0)
        configs.check(self, "be positive", minutes=self.minutes is None or self.minutes > 0)
        configs.check(self, "be in [0, 2^31)", seed=0 <= self.seed < 2**31)


@dataclass(frozen=True)
class Result:
    """The result of a training run."""

    step: int
    """Steps done, including those before a resume."""
    interrupted: bool
    """Whether Ctrl-C or SIGTERM stopped it; a checkpoint was written."""
    evaluation: dict[str, float]
    """The last metrics on held-out images; empty if there was no evaluation."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Unusable images, as (name, reason)."""


class Diverged(UserError):
    """The loss or the weights are no longer finite: the last checkpoint is worth more than the present weights."""


class Task(Protocol):
    """A model to train: its losses, schedule, evaluation and files."""

    name: str
    model: Any
    optimizer: torch.optim.Optimizer
    ema_decay: float
    max_grad_norm: float

    def learning_rate(self, step: int, fraction: float) -> float:
        """The learning rate of a step; `fraction` of the run is done."""

    def losses(self, step: int, fraction: float) -> dict[str, Tensor]:
        """The "loss" to minimise, and other scalars to log, for the batch of a step."""

    def evaluate(self, model: Any) -> dict[str, float]:
        """Metrics on held-out images; empty if there are none."""

    def save_samples(self, model: Any, path: Path) -> None:
        """Writes a PNG with samples of the model."""

    def write_model(self, model: Any, done: bool) -> None:
        """Writes the model into the model directory; `done` is set at the end of training."""


def train(task: Task, config: TrainConfig, identity: dict, on_step: OnStep | None = None) -> Result:
    """Trains until the steps or minutes are used up or a signal arrives; writes a checkpoint and the EMA model.

    Args:
        task: the model to train.
        config: the options.
        identity: what a checkpoint must have in common with this run to be resumed, besides `config`.
        on_step: called with the progress after every `log_every` steps.

    Raises:
        UserError: a file cannot be written, the checkpoint to resume is damaged or of another run, the images can no
            longer be read, or the loss is not finite. In all cases but the last, the steps done are saved first.
    """
    path = checkpoint_path(config, task.name)
    identity = identity | {k: v for k, v in configs.to_dict(config).items() if k not in MAY_CHANGE_ON_RESUME}
    if config.init is not None:  # by content: the model may move before the training is resumed
        identity["initial weights"] = fingerprint(task.model)
    state = TrainingState(task.model, ema(task.model, task.ema_decay), task.optimizer)
    if config.resume:
        checkpoint.load(path, state, identity)

    def save() -> None:
        if not all(tensor.isfinite().all() for tensor in checkpoint.state_tensors(state).values()):
            raise Diverged(f"the weights are no longer finite at step {state.step}: try a smaller --lr")
        writable_directory(config.out)  # again, in case it was removed
        checkpoint.save(path, state, identity)
        task.write_model(state.ema.module, _fraction(config, state) == 1)

    began = time.monotonic() - state.elapsed
    log, last = _Logger(config, on_step), {}
    with _signals() as interrupted, _saving_before_errors(state, save), log:
        while (fraction := _fraction(config, state)) < 1 and not interrupted():
            losses = _update(task, config, state, fraction)
            state.elapsed = time.monotonic() - began
            fraction, evaluation = _fraction(config, state), {}
            if fraction == 1 or (config.eval_every and state.step % config.eval_every == 0):
                last = evaluation = _evaluate(task, config, state)
            log(state, fraction, losses, evaluation)
            if state.step % config.save_every == 0 and fraction < 1:
                save()
        if not last and not interrupted():  # the training was already complete
            last = _evaluate(task, config, state)
        save()
        return Result(state.step, interrupted(), last)


def autocast(config: TrainConfig) -> AbstractContextManager:
    """The autocast context of the forward pass, for `config.precision`."""
    device = torch.device(config.device).type
    wanted = config.precision == "bfloat16" or (config.precision == "auto" and _computes_bfloat16(device))
    return torch.autocast(device, torch.bfloat16) if wanted else nullcontext()


@contextmanager
def output_directory(config: TrainConfig, name: str, *, writes: Sequence[str] = ()) -> Iterator[None]:
    """Holds the lock of the output directory for the files of the parts that are written, by default of `name` only.

    Raises UserError if the directory is not writable, another training of these files is at work in it, or the
    checkpoint of `name` is missing (to resume) or exists (otherwise).
    """
    path = checkpoint_path(config, name)
    if config.resume and not path.exists():  # checked before the directory is made
        raise UserError(f"{path} does not exist, so there is nothing to resume: omit --resume")
    with sole_writer(writable_directory(config.out), *writes or (name,)):
        if not config.resume and path.exists():
            raise UserError(f"{path} holds a training run: add --resume to continue it, or delete it to restart")
        yield


def prepare(config: TrainConfig) -> torch.device:
    """Sets the threads and the seed of the initial weights, and returns the device; UserError if it is unusable."""
    if config.threads is not None:
        if config.threads < 1:
            raise UserError(f"threads must be at least 1, not {config.threads}")
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    return choose_device(config.device)


def checkpoint_path(config: TrainConfig, name: str) -> Path:
    """The path of the training checkpoint of the part `name` in the model directory."""
    return Path(config.out) / f"{name}.run.safetensors"


def _computes_bfloat16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _fraction(config: TrainConfig, state: TrainingState) -> float:
    done = state.step / config.steps if config.minutes is None else state.elapsed / (60 * config.minutes)
    return min(done, 1.0)


def _update(task: Task, config: TrainConfig, state: TrainingState, fraction: float) -> dict[str, Tensor]:
    for group in state.optimizer.param_groups:
        group["lr"] = task.learning_rate(state.step, fraction)
    with autocast(config):
        losses = task.losses(state.step, fraction)
    state.optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    if task.max_grad_norm < math.inf:
        nn.utils.clip_grad_norm_(state.model.parameters(), task.max_grad_norm)
    state.torn = True
    state.optimizer.step()
    state.ema.update_parameters(state.model)
    state.step += 1
    state.torn = False
    return {name: value.detach() for name, value in losses.items()}


def _evaluate(task: Task, config: TrainConfig, state: TrainingState) -> dict[str, float]:
    model = state.ema.module.eval()
    with torch.inference_mode(), autocast(config):
        task.save_samples(model, writable_directory(config.out / SAMPLES) / f"{task.name}-{state.step:07}.png")
        return task.evaluate(model)


class _Logger:
    """Accumulates losses, and passes their means to `on_step` and TensorBoard every `log_every` steps."""

    def __init__(self, config: TrainConfig, on_step: OnStep | None) -> None:
        self.config, self.on_step = config, on_step
        self.since, self.losses = time.monotonic(), []
        self.curves = None
        if config.tensorboard:
            with extras():
                from torch.utils.tensorboard import SummaryWriter

            self.curves = SummaryWriter(str(config.out / "curves"))

    def __enter__(self) -> "_Logger":
        return self

    def __exit__(self, *_: object) -> None:
        if self.curves:
            self.curves.close()

    def __call__(
        self, state: TrainingState, fraction: float, losses: dict[str, Tensor], evaluation: dict[str, float]
    ) -> None:
        self.losses.append(losses)
        if fraction < 1 and not evaluation and state.step % self.config.log_every:
            return
        count, seconds = len(self.losses), max(time.monotonic() - self.since, 1e-9)
        metrics = _means(self.losses)
        if not math.isfinite(metrics["loss"]):
            raise Diverged(f"the loss became {metrics['loss']} at step {state.step}: try a smaller --lr")
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
def _saving_before_errors(state: TrainingState, save: Callable[[], None]) -> Iterator[None]:
    """Saves before an error ends the training, so that it costs no more steps than Ctrl-C."""
    try:
        yield
    except Diverged:
        raise
    except Exception as error:
        lost = state.step - state.saved
        if not lost or state.torn:
            raise
        try:
            save()
        except UserError:
            outcome = f"the checkpoint cannot be written either, so that the last {lost} steps are lost"
        else:
            outcome = f"a checkpoint of step {state.step} is saved: once that is mended, resume with --resume"
        if not isinstance(error, UserError):
            raise
        raise UserError(f"{error}; {outcome}") from error


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM was received. A second signal acts as usual."""
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
        pass  # only the main thread can handle signals
    try:
        yield lambda: bool(received)
    finally:
        restore()
