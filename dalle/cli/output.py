"""What commands print and write: standard streams that never fail, escaped names, and paths that are checked first."""

import contextlib
import os
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from dalle.errors import UserError


class Stream:
    """A standard stream whose writes never raise, so that no work is lost to a closed pipe or a terminal's encoding.

    Characters that the encoding lacks are escaped. After a write that failed, the rest is discarded.

    Attributes:
        failure: why a write failed, or None.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        self._attempt(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable, *arguments: str) -> None:
        if self.failure is not None:
            return
        try:
            action(*arguments)
        except OSError as error:
            self.failure = error
            with contextlib.suppress(OSError), open(os.devnull, "wb") as null:  # takes what the stream still buffers
                os.dup2(null.fileno(), self.stream.fileno())


@contextlib.contextmanager
def standard_streams() -> Iterator[Stream]:
    """Within the block, sys.stdout and sys.stderr are Streams. Yields the former."""
    with open(os.devnull, "w") as null:  # in place of a closed stream, which is None
        out, err = Stream(sys.stdout or null), Stream(sys.stderr or null)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # pyrefly: ignore[bad-argument-type]
            try:
                yield out
            finally:
                out.flush()
                err.flush()


def printable(text: str) -> str:
    """The text on one line, with control characters, which could change a terminal, escaped as in Python strings."""
    escaped = ("Cc", "Cs", "Zl", "Zp")  # controls, lone surrogates (undecodable bytes of a file name), separators
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in escaped else c for c in text)


def png_path(path: Path) -> Path:
    """Returns `path` if a PNG can be written there; raises a UserError otherwise."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path} is not the name of a PNG file: choose one that ends in .png")
    try:
        target = path.resolve()  # images are written through symbolic links
        if target.is_dir():
            raise UserError(f"{path} is a directory: choose a file name")
        with tempfile.TemporaryFile(dir=target.parent):
            return path
    except (OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written ({reason}): choose another path") from error
