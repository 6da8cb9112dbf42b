"""Configurations are frozen dataclasses: this module reads and writes them as JSON and hands out presets."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dalle.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def preset(presets: Mapping[str, Config], name: str) -> Config:
    """`presets[name]`, or a UserError that lists the names there are."""
    if name not in presets:
        raise UserError(f"there is no preset {name!r}; the presets are {', '.join(sorted(presets))}")
    return presets[name]


def check(config: object, wanted: str, **fits: bool) -> None:
    """A UserError for the first field in `fits` that does not: it must `wanted`."""
    for name, fit in fits.items():
        if not fit:
            raise UserError(f"{name} must {wanted}, not {getattr(config, name)}")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready data: tuples become lists, paths strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(cls: type[Config], data: dict[str, Any], origin: str) -> Config:
    """The dataclass `cls` with the fields of `data`; a UserError naming `origin` if they do not fit."""
    if not isinstance(data, dict):
        raise UserError(f"{origin} holds {type(data).__name__}, not the fields of a {cls.__name__}")
    fields = typing.get_type_hints(cls)
    if unknown := sorted(set(data) - set(fields)):
        raise UserError(f"{origin} has fields that a {cls.__name__} does not know: {', '.join(unknown)}")
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(data)):
        raise UserError(f"{origin} lacks the fields {', '.join(missing)} of a {cls.__name__}")
    try:
        return cls(**{name: _coerce(value, fields[name]) for name, value in data.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin} does not describe a {cls.__name__}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON in a file, or a UserError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def _coerce(value: Any, kind: Any) -> Any:
    """`value` checked against the annotation `kind`; lists become tuples and strings paths where it says so."""
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
    return value
