"""`dalle evaluate`."""

import sys
import time
from collections.abc import Iterator, Sequence

from dalle.cli.parsing import parse
from dalle.cli.progress import shown
from dalle.evaluation.evaluate import REPORT, EvaluateConfig, evaluate
from dalle.evaluation.plots import plot
from dalle.evaluation.table import table
from dalle.extras import MissingExtra
from dalle.runtime import Progress


def main(argv: list[str]) -> int:
    config = parse(EvaluateConfig, "evaluate", argv)
    try:
        report = evaluate(config, track)
    except KeyboardInterrupt:
        print(f"stopped; the sections that are complete are in {config.out / REPORT}", file=sys.stderr)
        return 130
    print(table(report))
    files = [config.out / REPORT]
    try:
        files += plot(report, config.out)
    except MissingExtra as error:
        print(f"no plots: {error}", file=sys.stderr)
    print("written:", ", ".join(map(str, files)))
    return 0


def track(title: str, items: Sequence[Sequence]) -> Iterator[Sequence]:
    """Yields the items, which are batches of images or captions, and shows the progress."""
    total, done, began = sum(map(len, items)), 0, time.monotonic()
    with shown(title) as on_step:
        for item in items:
            yield item
            done += len(item)
            seconds = time.monotonic() - began
            on_step(Progress(done, done / total, {}, done / seconds, seconds / done * (total - done)))
