"""Draws docs/patterns.png: the mask of every pattern, and what one image token sees of the text and of the grid.

    pip install "dalle-kernels[plots]"
    python docs/draw_patterns.py [FILE]
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import dalle_kernels as dk

P = dk.AttentionPattern
TEXT, GRID = 8, (8, 8)
QUERY = (6, 6)  # row and column of the query shown: near the edges, where the patterns differ most
ROW = TEXT + QUERY[0] * GRID[1] + QUERY[1]  # of the mask
PATTERNS = {
    "row": P.row(TEXT, GRID),
    "column": P.column(TEXT, GRID),
    'conv, edge="wrap"\nkernel=5': P.conv(TEXT, GRID, kernel=5),
    "causal": P.causal(TEXT, GRID),
    "axial_row": P.axial_row(TEXT, GRID),
    "corner_conv\nkernel=3, dilation=2": P.corner_conv(TEXT, GRID, kernel=3, dilation=2),
    'conv, edge="clip"\nkernel=5': P.conv(TEXT, GRID, kernel=5, edge="clip"),
    'conv, edge="torus"\nkernel=5': P.conv(TEXT, GRID, kernel=5, edge="torus"),
}
LATER, HIDDEN, TEXT_KEY, IMAGE_KEY, SELF = range(5)
LABELS = ("later than the query", "hidden", "text key seen", "image key seen", "the query itself")
COLOURS = ("#ffffff", "#e3e3e3", "#7fc6a4", "#3f78b5", "#f0803c")
CMAP = ListedColormap(COLOURS)
GAP = 0.6  # between the text and the grid, in cells


def kinds(pattern):
    """What every key (column) is to every query (row): int [N, N]."""
    n = pattern.seq_len
    query, key = np.arange(n)[:, None], np.arange(n)[None]
    seen = np.where(key < TEXT, TEXT_KEY, IMAGE_KEY)
    kind = np.where(pattern.dense().numpy(), seen, np.where(key > query, LATER, HIDDEN))
    return np.where(key == query, SELF, kind)


def draw_mask(axes, mask, name):
    axes.imshow(mask, cmap=CMAP, vmin=0, vmax=len(COLOURS) - 1, interpolation="nearest", extent=(0, *mask.shape, 0))
    axes.axhline(TEXT, color="black", lw=0.7)
    axes.axvline(TEXT, color="black", lw=0.7)
    edge, row = len(mask), ROW + 0.5
    axes.annotate("", (edge, row), (edge + 6, row), arrowprops={"arrowstyle": "-|>", "color": COLOURS[SELF], "lw": 2})
    axes.set_title(name, fontsize=10, family="monospace")


def draw_query(axes, mask):
    """A row of text keys above the image grid, as the query sees them."""
    above = GAP + 1
    for keys, top in ((mask[ROW, :TEXT], -above), (mask[ROW, TEXT:], 0)):
        cells = keys.reshape(-1, GRID[1])
        edges = np.arange(cells.shape[1] + 1), np.arange(top, top + len(cells) + 1)
        style = {"edgecolors": "#a8a8a8", "lw": 0.4, "clip_on": False}
        axes.pcolormesh(*edges, cells, cmap=CMAP, vmin=0, vmax=len(COLOURS) - 1, **style)
    axes.set(aspect="equal", xlim=(-0.1, GRID[1] + 0.1), ylim=(GRID[0] + 0.1, -above - 0.1), frame_on=False)


def draw():
    matplotlib.rcParams["font.size"] = 9
    figure = Figure(figsize=(11, 9.6), layout="constrained")
    columns = len(PATTERNS) // 2
    grid = figure.add_gridspec(4, columns, height_ratios=2 * [10, 7])
    for i, (name, pattern) in enumerate(PATTERNS.items()):
        top, column, mask = 2 * (i // columns), i % columns, kinds(pattern)
        upper, lower = (figure.add_subplot(grid[top + j, column], xticks=[], yticks=[]) for j in range(2))
        draw_mask(upper, mask, name)
        draw_query(lower, mask)
        if column == 0:
            upper.set_ylabel("queries")
            upper.set_xlabel("keys")
            for text, height in (("text", -GAP - 0.5), ("image", GRID[0] / 2)):
                lower.text(-0.5, height, text, ha="right", va="center")
    patches = [Patch(facecolor=c, edgecolor="#888888", label=label) for c, label in zip(COLOURS, LABELS)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).with_name("patterns.png"))
    draw().savefig(parser.parse_args().file, dpi=110)
