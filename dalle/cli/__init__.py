"""The command line: `dalle COMMAND`, one module per command; those of `dalle train` share one.

A command that ends well returns 0. The user's mistakes are one line on stderr and exit code 2, Ctrl-C is exit code 130,
and anything else is a bug and shows its traceback.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from dalle.errors import UserError
from dalle.extras import extras

COMMANDS = {
    "demo": "draw with the model that ships in the package",
    "train dvae": "train the dVAE, which turns pictures into codes and back",
    "train decoder": "train the dVAE's decoder further, on codes as they are drawn",
    "tokenize": "turn captioned pictures into codes, once, with a trained dVAE",
    "train prior": "train the prior, which writes the codes of a picture for a caption",
    "train clip": "train a CLIP, which says how well a picture fits a caption",
    "generate": "draw pictures for captions",
    "complete": "draw a part of a picture anew",
    "evaluate": "measure a model: reconstructions, losses, retrieval, what its drawings show",
    "reconstruct": "pass pictures through the dVAE and back",
    "export": "copy what drawing needs of a model, with weights of 16 bits",
    "info": "what a model directory holds, or what is installed here",
}  # modules are imported when their command is run: torch takes seconds to load


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` (by default the process's own) and returns the exit code."""
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
            "DALL·E 1 from pictures to pictures: train it, draw with it.",
            "",
            *lines,
            "",
            "dalle COMMAND --help shows every option of a command with its default.",
        ]
    )
