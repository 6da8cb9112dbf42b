"""Imports run one way, and public names are annotated."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import dalle_kernels

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("draw_imports", ROOT / "docs" / "draw_imports.py")
draw_imports = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(draw_imports)


def test_imports_lead_down():
    pairs = draw_imports.imports(ROOT)
    assert len(pairs) > 100
    assert not draw_imports.upward(pairs)
    assert not draw_imports.circles(pairs)


def test_what_is_wrong_is_found(tmp_path):
    """All relative and absolute imports of modules and names, including those in functions."""
    files = {
        "dalle/__init__.py": "",
        "dalle/models/prior.py": "def f():\n    from dalle.cli import main\n",
        "dalle/cli/__init__.py": "from dalle.models import prior\n",
        "dalle/cli/train.py": "import dalle.training.loop\n",
        "dalle/cli/info.py": "import dalle.training.loop\n",
        "dalle/training/loop.py": "",
        "dalle_kernels/__init__.py": "from .backends import select\n",
        "dalle_kernels/backends/__init__.py": "from .. import patterns\n",
        "dalle_kernels/patterns.py": "from . import backends\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    pairs = draw_imports.imports(tmp_path)
    assert draw_imports.upward(pairs) == [
        ("dalle.cli.info", "dalle.training.loop"),
        ("dalle.models.prior", "dalle.cli"),
        ("dalle_kernels.patterns", "dalle_kernels.backends"),
    ]
    assert draw_imports.circles(pairs) == [
        ["dalle.cli", "dalle.models.prior"],
        ["dalle_kernels.backends", "dalle_kernels.patterns"],
    ]


def public(module):
    """The public functions of a module, and the public methods of its classes."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield name, value
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                function = getattr(member, "__func__", getattr(member, "fget", member))
                own = inspect.isfunction(function) and function.__module__ == module.__name__
                if own and (attribute == "__init__" or not attribute.startswith("_")):
                    yield f"{name}.{attribute}", function


MODULES = [f"dalle_kernels.{path.stem}" for path in sorted(Path(dalle_kernels.__file__).parent.glob("*.py"))]


@pytest.mark.parametrize("name", [name for name in MODULES if "__" not in name and not name.endswith(".tune")])
def test_public_functions_are_annotated(name):
    for function, value in public(importlib.import_module(name)):
        parameters = inspect.signature(value).parameters.values()
        missing = [p.name for p in parameters if p.annotation is p.empty and p.name not in ("self", "cls", "ctx")]
        assert not missing, f"{function} does not annotate {', '.join(missing)}"
        assert "return" in value.__annotations__, f"{function} does not annotate its result"


def test_test_modules_share_through_helpers_alone():
    """A test module that imports another one runs its tests twice, and breaks when they change."""
    pattern = re.compile(r"^\s*(?:from|import) test_\w+", re.M)
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert not pattern.search(path.read_text(encoding="utf-8")), path
