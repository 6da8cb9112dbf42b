"""Progress of a command on stderr: a bar on a terminal, and otherwise a plain line every few seconds."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

from dalle.runtime import OnStep, Progress

QUIET_SECONDS = 10  # minimum interval between plain lines


@contextmanager
def shown(title: str) -> Iterator[OnStep]:
    """Yields an `on_step` callback that shows progress under a title."""
    if not sys.stderr.isatty():
        yield _Lines(title)
        return
    columns = TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn(), TextColumn("{task.fields[status]}")
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=1.0, status="")

        def on_step(progress: Progress) -> None:
            if line := evaluation(progress):
                bar.console.print(line, highlight=False)
            bar.update(task, completed=progress.fraction, status=status(progress))

        yield on_step


class _Lines:
    def __init__(self, title: str) -> None:
        self.title, self.last = title, -math.inf

    def __call__(self, progress: Progress) -> None:
        line = evaluation(progress)
        if line:
            print(f"{self.title}: {line}", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last >= QUIET_SECONDS:
            print(f"{self.title}: {progress.fraction:4.0%}  {status(progress)}", file=sys.stderr, flush=True)
            self.last = time.monotonic()


def status(progress: Progress) -> str:
    """Step, losses, throughput and time left; commands without losses show the number of images instead."""
    losses = [f"{name} {value:.3f}" for name, value in progress.metrics.items()]
    speed = f"{progress.images_per_second:.0f} images/s"
    count = f"step {progress.step}" if losses else f"{progress.step} images"
    return "  ".join([count, *losses, speed, f"{duration(progress.seconds_left)} left"])


def evaluation(progress: Progress) -> str:
    """The metrics of an evaluation as text, empty if there was none."""
    if not progress.evaluation:
        return ""
    return f"step {progress.step}, held-out images: {numbers(progress.evaluation)}"


def numbers(values: dict[str, float]) -> str:
    """Named values as text, integers without decimals."""
    return ", ".join(f"{name} {value if isinstance(value, int) else f'{value:.3f}'}" for name, value in values.items())


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03 or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
