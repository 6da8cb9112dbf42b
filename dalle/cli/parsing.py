"""Parses arguments into configurations: tyro derives the options from their fields, defaults and docstrings."""

import io
import os
import shutil
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from typing import Any, TypeVar

import tyro

from dalle import config as configs
from dalle.errors import UserError

Config = TypeVar("Config")

NARROWEST = 40  # columns; tyro needs several for each of its own
STYLE = (
    tyro.conf.AvoidSubcommands,  # a nested configuration that may be None is a group of options, not a subcommand
    tyro.conf.DisallowNone,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.PositionalMetavarFromFieldName,
)


def parse(config_class: type[Config], command: str, argv: list[str], default: Config | None = None) -> Config:
    """Parses `argv`. Raises a UserError for an invalid value; exits with 2 for an unknown option."""
    instead: dict[str, Any] = {} if default is None else {"default": default}
    messages = io.StringIO()
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    tyro._experimental_options["ansi_codes"] = not os.environ.get("NO_COLOR")
    try:
        with redirect_stderr(messages):
            config = tyro.cli(config_class, prog=f"dalle {command}", args=argv, config=STYLE, **instead)
    except SystemExit as end:
        if (error := _refusal(end)) is not None:
            raise error from None
        sys.stderr.write(messages.getvalue())
        raise
    configs.check_limits(config)
    return config


def parse_with_preset(config_class: type[Any], command: str, argv: list[str], presets: dict[str, Any]) -> Any:
    """As `parse`, with an option for each field of the model (`--model.layers 4`), which defaults to the preset's."""
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
    """The UserError that a configuration raised and tyro wrapped, if any."""
    cause = end.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    return cause
