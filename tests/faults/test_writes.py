"""A disk that is full at the n-th write, for every n: one sentence, nothing lost that was there, and a way to go on. A
process that is killed there: the next one goes on as if nothing had happened.
"""

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers_for_tests import Rudalle, small_rudalle, write_rudalle
from training_for_tests import assert_same_weights

import dalle.files
from dalle import Pipeline, UserError
from dalle.cli import main
from dalle.models.checkpoint import load_parts
from faults.models_for_tests import run_dvae, run_prior, run_tokenize


def train(directory):
    out = directory / "new"
    run_dvae(out, resume=(out / "dvae.run.safetensors").exists(), save_every=1, eval_every=1)


def resume(directory):
    run_prior(directory, resume=True, steps=3, save_every=1)


def export(directory):
    pipeline = Pipeline.from_pretrained(directory)
    pipeline.prior.half()
    pipeline.save_pretrained(directory / "exported")


def generate(directory):
    options = "--model", str(directory), "--candidates", "1", "--seed", "0", "--out", str(directory / "grid.png")
    if main(["generate", "red", *options]):
        raise UserError("exit code 2")


def convert(directory):
    files = directory / "files"
    with pytest.MonkeyPatch.context() as patch:
        small_rudalle(patch)
        if not files.exists():
            torch.manual_seed(4)
            write_rudalle(files, Rudalle(3))
        dalle.convert("rudalle", files, directory / "converted")


COMMANDS = {
    function.__name__.removeprefix("run_"): function
    for function in (train, resume, run_tokenize, export, generate, convert)
}  # each writes into a copy of the trained model, and can be called again


class Disk:
    """Fails at write number `full_at`, with half of the file on it, and at all later ones if `forever`."""

    def __init__(self, monkeypatch, full_at, forever):
        self.writes, self.full_at, self.forever = 0, full_at, forever
        self.sync = dalle.files._sync
        monkeypatch.setattr(dalle.files, "_sync", self)

    def __call__(self, path):
        if path.is_dir():
            return
        number, self.writes = self.writes, self.writes + 1
        if number == self.full_at or (self.forever and number > self.full_at):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise OSError(errno.ENOSPC, "No space left on device")


def weights(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob("*.safetensors"))


@pytest.mark.parametrize(("name", "forever"), [*((name, False) for name in COMMANDS), ("resume", True)])
def test_every_write(built, tmp_path, monkeypatch, name, forever, capsys):
    command = COMMANDS[name]
    whole = shutil.copytree(built, tmp_path / "whole")
    with monkeypatch.context() as patch:
        disk = Disk(patch, full_at=-1, forever=False)
        command(whole)
        total = disk.writes
    assert total >= 1
    for n in range(total):
        directory = shutil.copytree(built, tmp_path / str(n))
        with monkeypatch.context() as patch:
            Disk(patch, n, forever)
            with pytest.raises(UserError):
                command(directory)
        assert not list(directory.rglob("*.tmp"))
        load_parts(directory)
        command(directory)
        assert weights(directory) == weights(whole)
        for file in weights(whole):
            assert_same_weights(whole / file, directory / file)
    capsys.readouterr()


def test_kills(tmp_path, seed):
    """At random writes, the first and the last among them. Nothing of them is left, not even a temporary file."""
    numbers = [0, *sorted(random.Random(seed).sample(range(1, 23), 3)), 23]
    command = [sys.executable, "-m", "faults.kill_for_tests", str(tmp_path), *map(str, numbers)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # with a GPU, autograd starts threads, after which a process cannot fork
    subprocess.run(command, env=environment, check=True, timeout=120)
    for number in numbers:
        assert not list((tmp_path / str(number)).rglob("*.tmp"))
        for file in weights(tmp_path / "whole"):
            assert_same_weights(tmp_path / "whole" / file, tmp_path / str(number) / file)
