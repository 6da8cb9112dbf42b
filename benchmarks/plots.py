"""Plots the results as cpu.png: speed-ups against those predicted by sparsity, and scaling with the image size.

    python benchmarks/plots.py

recreates it from the JSON files in benchmarks/results/; it needs matplotlib.
"""

import json
import sys
from pathlib import Path

COLORS = {"ours": "#0b5394", "ours, dense causal": "#8fb8de", "FlexAttention": "#e69138", "plain PyTorch": "#b7b7b7"}
PATTERNS = {"row": "#0b5394", "column": "#38761d", "conv": "#a64d79", "causal SDPA": "#444444"}
STYLES = {"forward": "-", "forward and backward": "--"}
PANELS = [("forward", "float32"), ("forward", "bfloat16"), ("backward", "float32"), ("backward", "bfloat16")]


def plot(folder: Path, suffix: str = "-cpu") -> Path | None:
    """Writes cpu.png if its results exist; returns its path."""
    files = [folder / f"{name}{suffix}.json" for name in ("sparse_attention", "scaling")]
    if not all(file.exists() for file in files):
        return None
    from matplotlib.figure import Figure

    attention, scaling = (json.loads(file.read_text())["rows"] for file in files)
    attention = [row for row in attention if row["test"] == "test_paper_shape"]
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    _against_causal(above, attention)
    _growth(below, scaling)
    figure.savefig(folder / f"{suffix[1:]}.png", dpi=120)
    return folder / f"{suffix[1:]}.png"


def _having(rows, **parameters):
    return [row for row in rows if parameters.items() <= row["parameters"].items()]


def _against_causal(figure, rows):
    """The speed-up over causal SDPA for every pattern, and the pair ceiling."""
    figure.suptitle("Times faster than causal SDPA, 256 text + 32×32 image tokens, batch 2, 8 heads of 64", fontsize=10)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (direction, dtype) in zip(panels, PANELS):
        here = _having(rows, direction=direction, dtype=dtype)
        for place, row in enumerate(here):
            _bars(axes, place, row)
        axes.axhline(1, color="#444444", linewidth=0.8, linestyle=":")
        axes.set_title(f"{direction}, {dtype}", fontsize=9)
        axes.set_xticks(range(len(here)), [row["parameters"]["name"] for row in here], fontsize=9)
        axes.margins(y=0.08)
        axes.grid(axis="y", alpha=0.3)
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def _bars(axes, place, row):
    width, middle = 0.2, row["seconds"]["causal SDPA"][1]
    for i, (name, color) in enumerate(reversed(COLORS.items())):
        if name not in row["seconds"]:
            continue
        ratio, left = middle / row["seconds"][name][1], place + (i - 1.5) * width
        axes.bar(left, ratio, width, color=color, label=name)
        if name == "ours":
            axes.annotate(f"{ratio:.1f}", (left, ratio), ha="center", va="bottom", fontsize=8)
    ceiling = row["facts"]["pair ceiling"]
    axes.hlines(
        ceiling, place - 0.45, place + 0.45, color="#cc0000", linewidth=1.5, label="predicted by the number of pairs"
    )


def _growth(figure, rows):
    """Time and peak memory against the number of tokens."""
    figure.suptitle("One head of 64, float32, 256 text tokens and a growing image", fontsize=10)
    panels = dict(zip(("ms", "peak MB"), figure.subplots(1, 2)))
    for direction, style in STYLES.items():
        for name, color in PATTERNS.items():
            dense = name == "causal SDPA"  # timed with every pattern, shown once
            mine = _having(rows, direction=direction, name="row" if dense else name)
            tokens, key = [row["facts"]["tokens"] for row in mine], name if dense else "ours"
            values = {
                "ms": [row["seconds"][key][1] * 1e3 for row in mine],
                "peak MB": [row["facts"].get(f"{key}, peak MB", float("nan")) for row in mine],
            }
            for quantity, axes in panels.items():
                axes.plot(tokens, values[quantity], color=color, linestyle=style, marker="o", markersize=3)
    sides = {row["facts"]["tokens"]: row["parameters"]["side"] for row in rows}
    for axes, title in zip(panels.values(), ("time, ms", "peak memory beyond the inputs, MB")):
        axes.set(xscale="log", yscale="log", xlabel="image, and tokens with the text")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(list(sides), [f"{side}×{side}\n{tokens:,}" for tokens, side in sides.items()])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=name) for name, color in PATTERNS.items()]
    handles += [Line2D([], [], color="#888888", linestyle=style, label=name) for name, style in STYLES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)


if __name__ == "__main__":
    print(plot(Path(__file__).parent / "results", *sys.argv[1:]))
