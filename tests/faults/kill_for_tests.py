"""Trains a small dVAE in OUT/n, killed with SIGKILL at its n-th write, and continues it: python -m ... OUT n [n ...]

OUT/whole is one that was not killed. Every other run is a fork of it, because the first steps of a process take longer
than all the rest.
"""

import os
import signal
import sys
from pathlib import Path

import dalle.files
from faults.models_for_tests import run_dvae


def in_a_process(function, *arguments):
    """The exit status of a process that calls a function."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(out, number):
    """Half of the kills come before a file is replaced, the others after."""
    sync, calls = dalle.files._sync, iter(range(number))

    def sync_or_die(path):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    dalle.files._sync = sync_or_die
    train(out, resume=False)


def train(out, resume):
    run_dvae(out, resume=resume, save_every=1, eval_every=1, steps=3)


def main():
    out, numbers = Path(sys.argv[1]), [int(argument) for argument in sys.argv[2:]]
    train(out / "whole", resume=False)
    for number in numbers:
        directory = out / str(number)
        assert in_a_process(killed, directory, number) == -signal.SIGKILL
        assert list(directory.rglob("*.tmp")) or number % 2
        assert in_a_process(train, directory, (directory / "dvae.run.safetensors").exists()) == 0


if __name__ == "__main__":
    main()
