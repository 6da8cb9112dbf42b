"""The API pages in docs/api contain every public name and are up to date with the docstrings."""

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

API = Path(__file__).parents[1] / "docs/api"
PACKAGES = ("dalle_kernels", "dalle")
packages = pytest.mark.parametrize("package", PACKAGES)


def headings(package):
    return re.findall(r"^#+ `(\w+)`$", (API / f"{package}.md").read_text(encoding="utf-8"), re.MULTILINE)


def public_members(package):
    """The public names of a package, and the public methods and properties of its classes."""
    module = importlib.import_module(package)
    for name in module.__all__:
        yield name
        member = getattr(module, name)
        if inspect.isclass(member):
            kinds = (classmethod, staticmethod, property)
            own = ((key, value) for key, value in vars(member).items() if not key.startswith("_"))
            yield from (key for key, value in own if isinstance(value, kinds) or inspect.isfunction(value))


@packages
def test_every_public_name_is_in_the_page(package):
    names = list(public_members(package))
    assert len(names) > len(importlib.import_module(package).__all__)
    assert Counter(names) - Counter(headings(package)) == Counter(), "without a docstring, or missing; run: make docs"


@packages
def test_the_page_is_what_the_docstrings_give(package, monkeypatch):
    for tool in ("griffe2md", "black"):
        pytest.importorskip(tool, reason=f"{tool}, of the extra [docs], is not installed")
    monkeypatch.syspath_prepend(API.parent)
    page = importlib.import_module("make_api").page(package)
    assert page == (API / f"{package}.md").read_text(encoding="utf-8"), "docs/api is stale; run: make docs"
