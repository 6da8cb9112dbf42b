"""torch.compile support: functions and values that are constants of a compiled graph."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)
Value = TypeVar("Value")

_constants = types.SimpleNamespace()  # constants of compiled code; kept for the life of the process
_names = {}  # (make, args) of a constant: its name
_numbers = itertools.count()


def constant_result(function: Function) -> Function:
    """Marks a function that torch.compile calls while tracing, and whose result becomes a constant of the graph.

    Same as `torch.compiler.assume_constant_result`, but does not import torch._dynamo, which takes over a second.
    """
    function._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]
    return function


def constant(make: Callable[..., Value], *args: Hashable) -> Value:
    """make(*args), an immutable value. In compiled code it is created once, while torch.compile traces.

    torch.compile can neither trace the constructor of a frozen dataclass nor guard one that a marked function returns.
    It can guard one that it reads by name.
    """
    if torch.compiler.is_compiling():
        return getattr(_constants, _keep(make, *args))
    return make(*args)


@constant_result
def _keep(make: Callable, *args: Hashable) -> str:
    """The name of make(*args) in `_constants`, created once for equal arguments."""
    name = _names.setdefault((make, args), f"constant_{next(_numbers)}")
    if not hasattr(_constants, name):
        setattr(_constants, name, make(*args))
    return name
