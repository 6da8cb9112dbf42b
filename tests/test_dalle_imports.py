"""Imports of dalle run one way: cli -> training, evaluation -> generation -> models, data -> what all of them use."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "cli": {"training", "evaluation", "generation", "models", "data"},
    "training": {"generation", "models", "data"},
    "evaluation": {"generation", "models", "data"},
    "generation": {"models"},
    "models": set(),
    "data": set(),
}
TRAINING_COMMANDS = {"train.py", "tokenize.py"}
FILES = sorted((ROOT / "dalle").rglob("*.py"))


def imported(path):
    """The modules of dalle that a file imports when it is loaded or later, as parts of their names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            yield from ([*node.module.split("."), alias.name] for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    inside = path.relative_to(ROOT / "dalle").parts
    room = inside[0] if len(inside) > 1 else None
    if room is None and path.name in ("__init__.py", "__main__.py"):  # the front doors
        return
    rooms = {names[1] for names in imported(path) if names[0] == "dalle" and len(names) > 1} & BELOW.keys()
    allowed = BELOW.get(room, set()) | {room}
    if room == "cli" and path.name not in TRAINING_COMMANDS:
        allowed -= {"training"}
    assert rooms <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "dalle_kernels").rglob("*.py")), ids=lambda path: path.stem)
def test_the_kernels_know_no_model(path):
    assert "from dalle." not in path.read_text(encoding="utf-8")
