"""What torch.compile is told about this package."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)
Value = TypeVar("Value")

_constants = types.SimpleNamespace()  # of compiled code, as long as the process lives
_names = {}  # what made a constant: its name
_numbers = itertools.count()


def constant_result(function: Function) -> Function:
    """Marks a function that torch.compile calls while it traces, and whose result it keeps as a constant of the graph.

    Does what `torch.compiler.assume_constant_result` does, without importing torch._dynamo, which takes over a second.
    """
    function._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]
    return function


def constant(make: Callable[..., Value], *args: Hashable) -> Value:
    """make(*args), an immutable value. In compiled code it is made once, while torch.compile traces.

    torch.compile can neither trace how a frozen dataclass is made nor guard one that a marked function returns; it can
    guard one that it finds by name.
    """
    if torch.compiler.is_compiling():
        return getattr(_constants, _keep(make, *args))
    return make(*args)


@constant_result
def _keep(make: Callable, *args: Hashable) -> str:
    """The name of make(*args) in `_constants`; one for equal arguments."""
    name = _names.setdefault((make, args), f"constant_{next(_numbers)}")
    if not hasattr(_constants, name):
        setattr(_constants, name, make(*args))
    return name
