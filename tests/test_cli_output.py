"""What the command line prints: closed pipes, full disks, other encodings, narrow terminals, colours, version, help."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dalle
from dalle.cli import COMMANDS, main
from dalle.cli.output import printable
from dalle.errors import UserError
from dalle.runtime import choose_device
from dalle_kernels import __version__

FULL = Path("/dev/full")  # every write to it fails: no space left on device


@pytest.fixture
def closed_pipe():
    """A text stream, buffered as stdout is, whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        yield stream


def encoded(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize("command", [["--help"], ["train"], ["info"], ["tokenize", "--help"], ["generate", "--frob"]])
def test_a_reader_that_leaves_is_no_error(command, closed_pipe, monkeypatch, capsys):
    expected = main(command)
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    assert main(command) == expected
    assert bool(capsys.readouterr().err) == (expected != 0)


def test_messages_that_nobody_reads_stop_no_work(closed_pipe, monkeypatch, capsys):
    """As in `dalle train prior 2>&1 | head`."""

    def work():
        for step in range(3):
            print("step", step, file=sys.stderr, flush=True)
        print("done")
        return {}

    monkeypatch.setattr("dalle.cli.info._installation", work)
    monkeypatch.setattr(sys, "stderr", closed_pipe)
    assert main(["info"]) == 0
    assert "done" in capsys.readouterr().out


def test_the_interpreter_ends_quietly_too():
    """The interpreter flushes the streams once more when it exits."""
    environment = os.environ | {"PYTHONPATH": str(Path(dalle.__file__).parents[1])}
    command = [sys.executable, "-m", "dalle", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", [["--version"], ["train"], ["info"], ["tokenize", "--help"]])
def test_a_full_disk_is_one_line(command, monkeypatch, capsys):
    with FULL.open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(command) == 1
    assert capsys.readouterr().err == "dalle: the output cannot be written: No space left on device\n"


def test_closed_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--help"]) == 0 and main(["paint"]) == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", [["--help"], ["generate", "--help"]])
def test_help_in_any_encoding(command, encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", encoded(encoding))
    assert main(command) == 0
    shown = sys.stdout.buffer.getvalue().decode(encoding)
    assert "usage: dalle" in shown and (r"DALL\xb7E" in shown) == (encoding == "ascii" and command == ["--help"])


def test_characters_that_the_encoding_lacks_are_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", encoded("latin-1"))
    monkeypatch.setattr("dalle.cli.info._installation", lambda: {"prompt": "caf\xe9 \U0001f600 \udcff"})
    assert main(["info"]) == 0
    assert sys.stdout.buffer.getvalue().decode("latin-1") == "prompt: caf\xe9 \\U0001f600 \\udcff\n"


def test_printable():
    assert printable("a\x1b[31m\n\u2028\x9b\udcff\x7f") == r"a\x1b[31m\n\u2028\x9b\udcff\x7f"
    assert printable("\xe9 \u65e5\u672c \U0001f469\u200d\U0001f680") == "\xe9 \u65e5\u672c \U0001f469\u200d\U0001f680"


@pytest.mark.parametrize("columns", ["1", "2", "20", "0", "-1"])
def test_narrow_terminals(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["generate", "--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80 and len(shown) < 500
    assert main(["generate", "--frob"]) == 2 and "--frob" in capsys.readouterr().err


@pytest.mark.parametrize(("no_color", "colours"), [("", True), ("1", False)])
def test_no_color(no_color, colours, monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    assert main(["generate", "--help"]) == 0 and main(["generate", "--frob"]) == 2
    err = capsys.readouterr().err
    assert ("\x1b[" in terminal.getvalue()) == ("\x1b[" in err) == colours and "--frob" in err


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(option, capsys):
    assert main([option]) == 0 and capsys.readouterr().out == f"dalle {__version__}\n"


@pytest.mark.parametrize("command", [["train"], ["train", "--help"], ["train", "-h"]])
def test_train_lists_its_stages(command, capsys):
    assert main(command) == 0
    shown = capsys.readouterr().out
    stages = [name for name in COMMANDS if name.startswith("train ")]
    assert len(stages) == 4 and all(name in shown for name in stages) and "reconstruct" not in shown


@pytest.mark.parametrize("name", ["mps", "xla", "vulkan", "hpu", "toaster", "cuda:99", ""])
def test_a_device_that_cannot_be_used_is_one_short_sentence(name):
    with pytest.raises(UserError, match=f"device must be one that this PyTorch can use; got '{name}': .") as refused:
        choose_device(name)
    assert len(str(refused.value)) < 180 and "\n" not in str(refused.value) and ". " not in str(refused.value)
