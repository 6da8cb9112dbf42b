"""Runs stages in separate processes. A stage is a list of items; its process reports the begin and end of every item.
A failure, a crash or a hang costs one item; the others continue in a new process.

The module of a stage has `items(setting)`: (name, function) pairs, where function() returns the item's rows (dicts of
plain values) or None.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """A stage: its name, the time limits of the stage and of one item in seconds, and its log file."""

    name: str
    seconds: float
    item_seconds: float
    log: str

    def scaled(self, factor: float) -> Stage:
        return replace(self, seconds=self.seconds * factor, item_seconds=self.item_seconds * factor)


# The most important first. Their limits may add up to more than TOTAL; the last stages get the remaining time.
STAGES = [
    Stage("machine", 25, 25, "build.log"),
    Stage("build", 150, 140, "build.log"),
    Stage("compile", 40, 40, "build.log"),
    Stage("test", 90, 30, "test.log"),
    Stage("bench", 210, 60, "bench.log"),
    Stage("model", 90, 60, "bench.log"),
    Stage("sanitize", 60, 45, "sanitize.log"),
    Stage("suite", 240, 240, "test.log"),
    Stage("tune", 500, 400, "bench.log"),
]
ON_DEMAND = ("tune",)  # run only if named
TOTAL, LONG_FACTOR = 520.0, 8.0  # seconds for all stages; factor of all limits in a long run


class Budget:
    """The time limit shared by all stages, in seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return max(0.0, self._end - self._clock())

    def limit(self, seconds: float) -> float:
        """The limit of a stage that requests `seconds`."""
        return min(seconds, self.left())


# -- in the process of a stage


def work(items, skip: int, emit: Callable[..., None], settle: Callable[[], None]) -> None:
    """Runs the items from number `skip` on. `settle` raises if an error has left the device unusable; then the process
    ends, and a new one continues."""
    items = list(items)
    emit(items=[name for name, _ in items])
    for index, (_, function) in enumerate(items[skip:], skip):
        emit(begin=index)
        try:
            for row in function() or ():
                emit(row=row)
        except Exception as error:
            traceback.print_exc()
            emit(error=one_line(error))
            settle()
    emit(end=True)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:600]


def serve(module: str, setting, skip: int) -> None:
    """Runs a stage: messages go to standard output, everything printed goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(**message):
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    def settle():
        import torch

        if setting.on_gpu:
            torch.cuda.synchronize()

    work(importlib.import_module(f".{module}", __package__).items(setting), skip, emit, settle)


# -- in the parent process


@contextlib.contextmanager
def _messages(command: list[str], log: Path, environment: dict[str, str]):
    """The messages of a process, as a queue that ends with {"exit": status}. On exit, the process group is killed."""
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
    inbox = queue.Queue()

    def listen():
        for line in process.stdout:
            inbox.put(json.loads(line))
        inbox.put({"exit": process.wait()})

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield inbox
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_stage(
    stage: Stage,
    seconds: float,
    command: Callable[[int], list[str]],
    log: Path,
    record: Callable[..., None],
    environment: dict[str, str] | None = None,
) -> None:
    """Runs a stage for at most `seconds`. command(skip) is the command line of its process; record(item, ...) receives
    the item's rows, errors and seconds.
    """
    deadline = time.monotonic() + seconds
    names, at = [], -1  # the items; index of the running one

    def name():
        return names[at] if at >= 0 else stage.name

    while True:
        began, first, problem = time.monotonic(), at, None
        with _messages(command(at + 1), log, environment or dict(os.environ)) as inbox:
            while problem is None:
                end = min(deadline, began + stage.item_seconds)
                try:
                    message = inbox.get(timeout=max(0.0, end - time.monotonic()))
                except queue.Empty:
                    limit = "stage" if end == deadline else "item"
                    problem = f"stopped: the {limit} took longer than {end - began:.0f} s"
                    continue
                if "items" in message:
                    names = message["items"]
                elif "row" in message:
                    record(name(), row=message["row"])
                elif "error" in message:
                    record(name(), error=message["error"])
                elif "exit" in message:
                    problem = f"the process ended with exit status {message['exit']}; {tail(log)}"
                else:  # an item begins, or all items have ended
                    if at > first:
                        record(name(), seconds=time.monotonic() - began)
                    if "end" in message:
                        return
                    at, began = message["begin"], time.monotonic()
        record(name(), error=problem)
        if time.monotonic() >= deadline or at == first or at + 1 == len(names):
            for left in names[at + 1 :]:
                record(left, error="not reached")
            return


def tail(log: Path, lines: int = 8) -> str:
    """The last lines of a log file, in one line."""
    return " | ".join(line.strip() for line in log.read_text(errors="replace").splitlines()[-lines:])
