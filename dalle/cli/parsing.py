"""From arguments to configurations: tyro reads the command line off their fields, defaults and docstrings."""

import io
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from typing import Any, TypeVar

import tyro

from dalle import config as configs
from dalle.errors import UserError

Config = TypeVar("Config")

STYLE = (
    tyro.conf.AvoidSubcommands,  # a field that may be None is a group of options, not a command of its own
    tyro.conf.DisallowNone,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.PositionalMetavarFromFieldName,
)


def parse(config_class: type[Config], command: str, argv: list[str], default: Config | None = None) -> Config:
    """The configuration that `argv` describes. A value it refuses is a UserError, a misspelt option exits with 2."""
    instead: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(config_class, prog=f"dalle {command}", args=argv, config=STYLE, **instead)
    except SystemExit as end:
        if (error := _refusal(end)) is not None:
            raise error from None
        sys.stderr.write(said.getvalue())
        raise


def parse_with_preset(config_class: type[Any], command: str, argv: list[str], presets: dict[str, Any]) -> Any:
    """As `parse`; the fields of the model are options too (`--model.layers 4`), their defaults those of `--preset`."""
    name = _preset_name(argv) or config_class.preset
    size = configs.preset(presets, name)
    config = parse(config_class, command, argv, config_class(out=tyro.MISSING, preset=name, model=size))
    return replace(config, model=None) if config.model == size else config


def _preset_name(argv: list[str]) -> str | None:
    for option, value in zip(argv, [*argv[1:], ""]):
        if option == "--preset":
            return value
        if option.startswith("--preset="):
            return option.removeprefix("--preset=")
    return None


def _refusal(end: BaseException) -> UserError | None:
    """The UserError of a configuration's own checks, which tyro wraps."""
    cause = end.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    return cause
