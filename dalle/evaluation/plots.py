"""Plots of an evaluation, made with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dalle.extras import extras
from dalle.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = ("joint", "colour", "shape")


def plot(report: dict, out: Path) -> list[Path]:
    """Writes ranks.png and candidates.png for the sections that the report has, and returns their paths.

    Raises MissingExtra if matplotlib is not installed.
    """
    with extras():
        from matplotlib.figure import Figure

    paths = []
    for name, plot_axes in {"ranks": _ranks, "candidates": _candidates}.items():
        if name not in report:
            continue
        groups = {group: entries for group, entries in report[name].items() if isinstance(entries, dict)}
        figure = Figure(figsize=(4.8 * len(groups), 3.8), layout="constrained")
        all_axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
        for axes, (group, entries) in zip(all_axes, groups.items()):
            plot_axes(axes, entries)
            axes.set(title=group, ylim=(0, 1))
            axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        paths.append(out / f"{name}.png")
        with atomic_write(paths[-1]) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return paths


def _ranks(axes: Axes, entries: dict) -> None:
    """The cumulative distribution of the ranks."""
    for kind, entry in entries.items():
        ranks = sorted(entry["ranks"])
        axes.step(ranks, [(i + 1) / len(ranks) for i in range(len(ranks))], where="post", label=kind)
    axes.set(xscale="log", xlabel="rank k of the caption's image", ylabel="fraction of captions with rank at most k")
    axes.set_xlim(left=0.9)


def _candidates(axes: Axes, entries: dict) -> None:
    """Accuracy against the number of candidates, with intervals; dashed, how often any candidate is correct."""
    for name in SHOWN:
        curve = entries[name]
        low, high = zip(*curve["ranked, 95 %"])
        (line,) = axes.plot(curve["candidates"], curve["ranked"], marker=".", label=f"{name}, best by CLIP")
        axes.fill_between(curve["candidates"], low, high, color=line.get_color(), alpha=0.15)
        axes.plot(curve["candidates"], curve["oracle"], "--", color=line.get_color(), label=f"{name}, any correct")
    axes.set(xlabel="candidates", ylabel="accuracy")
    axes.set_xscale("log", base=2)
