"""Support for torch.compile and other tracers: functions and values that are constants of a graph."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Generator, Hashable
from typing import TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

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


@contextlib.contextmanager
def plain_tensors() -> Generator[None, None, None]:
    """Tensors that are created in the block are ordinary ones, fit for a cache, even in inference mode (autograd cannot
    save inference tensors), under FakeTensorMode, in a trace or in a transform of torch.func.
    """
    with torch.inference_mode(False), _disable_current_modes(), temporarily_clear_interpreter_stack():
        yield


def intercepted() -> bool:
    """Whether a mode such as FakeTensorMode or that of make_fx intercepts operations."""
    return torch._C._len_torch_dispatch_stack() > 0


def lifted(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cached tensors as arguments of operations: constants for the modes that intercept them."""
    if torch.compiler.is_compiling() or not intercepted():
        return tensors
    return tuple(torch.ops.aten.lift_fresh.default(tensor) for tensor in tensors)
