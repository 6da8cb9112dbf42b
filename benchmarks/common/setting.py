"""The settings of the GPU run, and helpers for its processes."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("cuda", "triton")  # the backends to check and measure, if the package has them


@dataclass(frozen=True)
class Setting:
    """The settings of every stage. `tiny`: all code on small sizes, for a dry run without a GPU."""

    device: str = "cuda"
    long: bool = False
    tiny: bool = False
    ours: tuple[str, ...] = OURS

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def backends(self) -> list[str]:
        """Our backends for this device. One that cannot run is included, so that its reason is recorded."""
        from dalle_kernels.backends import BACKENDS

        return [name for name in self.ours if name in BACKENDS] if self.on_gpu else [self.device]


def logged(command: list[str], **options) -> None:
    """Runs a command with its output in the stage's log; if it fails, the error has the last lines."""
    print("$", *command, flush=True)
    last = deque(maxlen=12)
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", **options,
    ) as process:  # fmt: skip
        for line in process.stdout:
            print(line, end="", flush=True)
            last.append(line)
    if process.returncode:
        raise RuntimeError(f"{Path(command[0]).name} gave exit status {process.returncode}:\n{''.join(last)}")


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
