"""Packages of others, with stand-ins for what they import and the tests do not need.

`pip install --no-deps dalle-pytorch rudalle taming-transformers einops rotary-embedding-torch
axial-positional-embedding` is enough for all.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from unittest import mock

import huggingface_hub
import pytest

# taming.models needs Lightning, and lacks a class that dalle-pytorch imports
REPLACED = ("taming.models",)
UNNEEDED = (
    "cv2", "ftfy", "more_itertools", "omegaconf", "pywt", "regex", "requests", "torchvision", "transformers",
    "youtokentome",
)  # fmt: skip


class Stub(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder:
    """Finds a Stub for every module of `packages`."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if any(f"{name}.".startswith(f"{package}.") for package in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def stubs():
    """Within the block, packages that are missing here can be imported; afterwards they are missing again."""
    finder = Finder([*REPLACED, *(name for name in UNNEEDED if importlib.util.find_spec(name) is None)])
    sys.meta_path.insert(0, finder)
    try:
        with mock.patch.object(huggingface_hub, "cached_download", None, create=True):  # which rudalle imports
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, Stub)]:
            del sys.modules[name]


def peer(module, package):
    """The module of a package of others, or a skip."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed; run: pip install --no-deps {package}")
    with stubs():
        return importlib.import_module(module)
