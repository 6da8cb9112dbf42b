"""What the training commands share: progress, the summary, and what to say after Ctrl-C."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from dalle.cli.progress import HELD_OUT, metrics, shown
from dalle.files import write_text
from dalle.training.loop import Result, TrainConfig

LISTED = 5  # skipped pictures that are named on the screen; all are in a file


def run(command: str, argv: list[str], train: Callable[..., Result], config: TrainConfig) -> int:
    """Trains, says how it went, and returns the exit code: 0, or 130 after Ctrl-C."""
    with shown(command) as on_step:
        result = train(config, on_step=on_step)
    report_skipped(result.skipped, config.out)
    if result.interrupted:
        again = shlex.join(["dalle", *command.split(), *argv, *(() if config.resume else ("--resume",))])
        print(f"stopped at step {result.step}, which is saved; to go on:\n  {again}", file=sys.stderr)
        return 130
    found = metrics({name.removeprefix(HELD_OUT): value for name, value in result.metrics.items()})
    print(f"{result.step} steps, model in {config.out}" + (f"; held-out pictures: {found}" if found else ""))
    return 0


def report_skipped(skipped: list[tuple[str, str]], out: Path) -> None:
    """Counts the pictures that were left out, names a few, and lists them all in `out`/skipped.txt."""
    if not skipped:
        return
    path = Path(out) / "skipped.txt"
    write_text(path, "".join(f"{name}: {reason}\n" for name, reason in skipped))
    print(f"{len(skipped)} files were skipped, all listed in {path}; the first:", file=sys.stderr)
    for name, reason in skipped[:LISTED]:
        print(f"  {name}: {reason}", file=sys.stderr)
