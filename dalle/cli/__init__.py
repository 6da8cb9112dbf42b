"""The command line, `dalle COMMAND`: one module per command; the `dalle train` commands share one.

Exit codes: 0 for success, 2 for invalid input, which prints one line on stderr, and 130 for Ctrl-C. Any other exception
is a bug and shows its traceback.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

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
    "info": "describe a model directory or this installation",
}  # a command's module is imported when it runs, because importing torch takes seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv`, by default sys.argv, and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except UserError as error:
        print("dalle:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dalle: interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    for words in (1, 2):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            with extras():
                return import_module(f"dalle.cli.{arguments[0]}").main(arguments[1:])
    name = " ".join(arguments[:2]) if arguments[0] == "train" else arguments[0]
    raise UserError(f"{name!r} is not a command: choose one of {', '.join(COMMANDS)}")


def _overview() -> str:
    lines = [f"  {name:<15}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dalle COMMAND [OPTIONS]",
            "",
            "DALL·E 1: train it on captioned images, generate images from prompts.",
            "",
            *lines,
            "",
            "dalle COMMAND --help lists the options of a command with their defaults.",
        ]
    )
