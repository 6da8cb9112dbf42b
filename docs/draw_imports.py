"""Draws docs/imports.png: the rooms of both packages from the top down, and who imports whom.

    pip install "dalle-kernels[plots]"
    python docs/draw_imports.py [FILE] [--source FOLDER]

Imports run one way, from the top down: tests/test_imports.py holds the code to it.
"""

from __future__ import annotations

import argparse
import ast
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the top down. A module belongs to the first room that names it; rooms of a row do not import each other.
ROOMS = (
    {
        "dalle.cli": ("commands, their options and output", "dalle.cli*", "dalle.__main__"),
        "dalle": ("the public names", "dalle"),
    },
    {
        "dalle.training": ("losses, schedules, checkpoints", "dalle.training*"),
        "dalle.evaluation": ("how good a model is", "dalle.evaluation*"),
        "dalle.conversion": ("weights of other projects", "dalle.conversion*"),
    },
    {
        "dalle.generation": ("from a prompt to ranked images", "dalle.generation*"),
    },
    {
        "dalle.models": ("dVAE, prior, CLIP; their files", "dalle.models*"),
        "dalle.data": ("images with captions", "dalle.data*"),
    },
    {
        "dalle.*": ("files, images, tokenizer, progress", "dalle.*"),
    },
    {
        "dalle_kernels": (
            "public operations and modules",
            "dalle_kernels",
            *(
                f"dalle_kernels.{name}"
                for name in (
                    "decode_attention", "decode_cache", "gumbel_softmax", "info", "nn", "patch*", "prepare",
                    "sample_tokens", "sparse_attention", "tune",
                )
            ),
        ),
    },
    {
        "dalle_kernels.backends": ("reference, cpu, cuda, triton; the choice", "dalle_kernels.backends*"),
    },
    {
        "plans": ("patterns compiled for tiles and steps", "dalle_kernels.plan", "dalle_kernels.decode_schedule"),
    },
    {
        "patterns": ("who sees whom; noise; what is told torch.compile", "dalle_kernels.*"),
    },
)  # fmt: skip


def room_of(module: str) -> tuple[int, str]:
    """The row and the name of a module's room."""
    for row, rooms in enumerate(ROOMS):
        for name, (_, *modules) in rooms.items():
            if any(fnmatchcase(module, pattern) for pattern in modules):
                return row, name
    raise ValueError(f"{module} has no room in {Path(__file__).name}")


def modules(source: Path) -> dict[str, Path]:
    """The files of both packages by module name."""
    files = [path for package in ("dalle", "dalle_kernels") for path in sorted((source / package).rglob("*.py"))]
    return {".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(source: Path) -> set[tuple[str, str]]:
    """All pairs (importer, imported) of modules, those inside functions included."""
    known, pairs = modules(source), set()
    for module, path in known.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                # `from package import x`: x is a module of it, or else something that the package itself defines
                names = [f"{origin}.{a.name}" if f"{origin}.{a.name}" in known else origin for a in node.names]
            else:
                continue
            pairs |= {(module, name) for name in names if name in known and name != module}
    return pairs


TRAINING_COMMANDS = ("dalle.cli.train", "dalle.cli.tokenize")


def upward(pairs: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The imports that do not stay in a room and do not lead down, and those of training by other commands."""
    rooms = {module: room_of(module) for pair in pairs for module in pair}
    training = {(a, b) for a, b in pairs if rooms[a][1] == "dalle.cli" and rooms[b][1] == "dalle.training"}
    up = {(a, b) for a, b in pairs if rooms[a] != rooms[b] and rooms[a][0] >= rooms[b][0]}
    return sorted(up | {(a, b) for a, b in training if a not in TRAINING_COMMANDS})


def circles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    """Modules that import each other, directly or not."""
    reached = {module: {b for a, b in pairs if a == module} for pair in pairs for module in pair}
    changed = True
    while changed:
        changed = False
        for below in reached.values():
            more = set().union(*(reached[other] for other in below)) - below
            below |= more
            changed |= bool(more)
    groups = {tuple(sorted(b for b in below if module in reached[b])) for module, below in reached.items()}
    return sorted(list(group) for group in groups if group)


def unimplied(arrows: set[tuple]) -> set[tuple]:
    """The arrows that do not follow from two or more others."""

    def reaches(a, b):
        return a == b or any(x == a and reaches(y, b) for x, y in down)

    down = {(a, b) for a, b in arrows if b[0] > a[0]}  # without circles
    implied = {(a, b) for a, b in down if any(x == a and y != b and reaches(y, b) for x, y in down)}
    return arrows - implied


def draw(pairs: set[tuple[str, str]], path: Path) -> None:
    """An arrow that follows from others is left out; one that leads upward is red."""
    from matplotlib.figure import Figure

    arrows = unimplied({(room_of(a), room_of(b)) for a, b in pairs if room_of(a) != room_of(b)})
    figure = Figure(figsize=(9, 1.25 * len(ROOMS)), layout="constrained")
    axes = figure.add_subplot()
    places = {}
    for row, rooms in enumerate(ROOMS):
        for i, (name, (job, *_)) in enumerate(rooms.items()):
            x, y = (i - (len(rooms) - 1) / 2) * 1.1, -row
            places[row, name] = x, y
            text = f"{name}\n{job}"
            box = dict(boxstyle="round,pad=0.45", facecolor="#eef3f8", edgecolor="#3f78b5")
            axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box, zorder=5)
    for a, b in sorted(arrows):
        (x, y), (to_x, to_y) = places[a], places[b]
        down = to_y < y
        far = y - to_y > 1
        bend = 0.35 * (1 if x + to_x >= 0 else -1) if far or not down else 0
        style = dict(arrowstyle="-|>", connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=2)
        style |= dict(color="#8a8a8a" if down else "#d62728")
        edge = 0.17 if down else -0.17  # of a box, above and below its middle
        axes.annotate("", (to_x, to_y + edge), (x, y - edge), arrowprops=style, zorder=1)
    axes.set_xlim(-1.5, 1.5), axes.set_ylim(-len(ROOMS) + 0.5, 0.5)
    axes.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).with_name("imports.png"))
    parser.add_argument("--source", type=Path, default=ROOT, help="the folder that holds both packages")
    args = parser.parse_args()
    pairs = imports(args.source)
    draw(pairs, args.file)
    print(f"{len(pairs)} imports, {len(upward(pairs))} upward, {len(circles(pairs))} circles; {args.file}")
    for a, b in upward(pairs):
        print(f"upward: {a} imports {b}")
    for group in circles(pairs):
        print(f"circle: {', '.join(group)}")


if __name__ == "__main__":
    main()
