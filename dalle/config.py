"""Configurations: frozen dataclasses, read and written as JSON, with named presets."""

import dataclasses
import json
import numbers
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dalle.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
MAX_INT = 2**31  # in files: larger numbers are nonsense


def preset(presets: Mapping[str, Config], name: str) -> Config:
    """Returns `presets[name]`; raises a UserError that lists the available names if there is no such preset."""
    if name not in presets:
        raise UserError(f"there is no preset {name!r}; the presets are {', '.join(sorted(presets))}")
    return presets[name]


def check(config: object, requirement: str, **valid: bool) -> None:
    """Raises a UserError, "FIELD must REQUIREMENT, not VALUE", for the first field in `valid` that is False."""
    for name, ok in valid.items():
        if not ok:
            raise UserError(f"{name} must {requirement}, not {getattr(config, name)}")


LIMITS = {"candidates": 100_000, "ranked": 100_000, "batch_size": 1_000_000, "crops": 1_000, "threads": 1_024}


def check_limits(config: object) -> None:
    """Raises a UserError for the first field above its limit in LIMITS, before memory or hours are spent on it."""
    for name, limit in LIMITS.items():
        value = getattr(config, name, None)
        check(config, f"be at most {limit:,}", **{name: not isinstance(value, numbers.Integral) or value <= limit})


def check_types(config: object, cls: type) -> None:
    """Raises a UserError for the first field of the dataclass `cls` that does not have its annotated type."""
    for name, kind in typing.get_type_hints(cls).items():
        check_type(name, getattr(config, name), *(typing.get_args(kind) or (kind,)))


def check_type(name: str, value: object, *kinds: type) -> None:
    """Raises a UserError, "NAME must be KIND, not VALUE", unless the value, maybe a number of NumPy's, is of a kind."""
    for kind in kinds:
        if isinstance(value, _KINDS[kind][0]) and (kind is bool or not isinstance(value, bool)):
            return
    raise UserError(f"{name} must be {' or '.join(_KINDS[kind][1] for kind in kinds)}, not {value!r}")


_KINDS = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a string"),
    type(None): (type(None), "None"),
}


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a dataclass to JSON-compatible data: tuples become lists, paths strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(cls: type[Config], data: dict[str, Any], origin: str) -> Config:
    """Builds the dataclass `cls` from `data`; raises a UserError that names `origin` if the fields do not match."""
    if not isinstance(data, dict):
        raise UserError(f"{origin} holds {type(data).__name__}, not the fields of a {cls.__name__}")
    fields = typing.get_type_hints(cls)
    if unknown := sorted(set(data) - set(fields)):
        raise UserError(f"{origin} has unknown fields for a {cls.__name__}: {_short(', '.join(unknown))}")
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(data)):
        raise UserError(f"{origin} lacks the fields {', '.join(missing)} of a {cls.__name__}")
    try:
        return cls(**{name: _coerce(value, fields[name]) for name, value in data.items()})
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{origin} does not describe a {cls.__name__}: {_short(str(error))}") from error


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + "…"


def _coerce(value: Any, kind: Any) -> Any:
    """Checks `value` against the annotation `kind`; converts lists to tuples and strings to paths where annotated."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        return _coerce(value, next(option for option in options if option is not type(None)))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{value!r} should be a list")
        inner = typing.get_args(kind)[0]
        return tuple(_coerce(item, inner) for item in value)
    if kind is Path:
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, str, bool) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise TypeError(f"{value!r} should be of type {kind.__name__}")
    if kind is int and abs(value) > MAX_INT:
        raise ValueError(f"{value} is not a size")
    return value
