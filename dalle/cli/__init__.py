"""The command line, `dalle COMMAND`: one module per command; the `dalle train` commands share one.

Exit codes: 0 for success, also if the reader of the output left; 1 if the output could not be written; 2 for invalid
input, which prints one line on stderr; and 130 for Ctrl-C. Any other exception is a bug and shows its traceback.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module

from dalle.cli.output import printable, standard_streams
from dalle.errors import UserError
from dalle.extras import extras

COMMANDS = {
    "demo": "generate images with the shipped model",
    "train dvae": "train the dVAE, which encodes images as codes and decodes them",
    "train decoder": "train the dVAE's decoder further, or a larger one, with the encoder frozen",
    "tokenize": "encode a captioned dataset as codes with a trained dVAE",
    "train prior": "train the prior, which generates the codes of an image from a prompt",
    "train clip": "train a CLIP, which scores how well an image matches a caption",
    "generate": "generate images from prompts",
    "complete": "regenerate a part of an image",
    "evaluate": "evaluate a model: reconstructions, likelihood, retrieval, generated images",
    "reconstruct": "encode images as codes and decode them",
    "export": "copy the parts of a model that generation needs, with 16-bit weights",
    "convert": "convert the weights of another project to a model directory",
    "info": "describe a model directory or this installation",
}  # a command's module is imported when it runs, because importing torch takes seconds

HELP = ("-h", "--help", "help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv`, by default sys.argv, and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with standard_streams() as out, warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code = _exit_code(arguments)
        out.flush()
        if out.failure is not None and not isinstance(out.failure, BrokenPipeError):
            print(f"dalle: the output cannot be written: {out.failure.strerror}", file=sys.stderr)
            code = code or 1
    return code


def _exit_code(arguments: list[str]) -> int:
    try:
        return _run(arguments)
    except SystemExit as end:  # tyro's, after the help or a misspelt option
        return int(end.code or 0)
    except UserError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(f"warning: {message}")


def _say(message: str) -> None:
    """Prints a message as one line on stderr."""
    print("dalle:", printable(" ".join(message.split())), file=sys.stderr)


def _run(arguments: list[str]) -> int:
    first, *others = arguments or ["--help"]
    if first in HELP:
        print(_overview(COMMANDS))
        return 0
    if first in ("-V", "--version"):
        from dalle_kernels import __version__

        print("dalle", __version__)
        return 0
    if first == "train" and (not others or others[0] in HELP):
        print(_overview({name: summary for name, summary in COMMANDS.items() if name.startswith("train ")}))
        return 0
    for words in (1, 2):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            with extras():
                return import_module(f"dalle.cli.{first}").main(others)
    name = " ".join(arguments[:2]) if first == "train" else first
    raise UserError(f"{name!r} is not a command: choose one of {', '.join(COMMANDS)}")


def _overview(commands: Mapping[str, str]) -> str:
    lines = [f"  {name:<15}{summary}" for name, summary in commands.items()]
    return "\n".join(
        [
            "usage: dalle COMMAND [OPTIONS]",
            "",
            "DALL·E 1: train it on captioned images, generate images from prompts.",
            "",
            *lines,
            "",
            "dalle COMMAND --help lists the options of a command with their defaults, dalle --version the version.",
        ]
    )
