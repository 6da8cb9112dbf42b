"""Short training runs, whole or interrupted and resumed."""

import dataclasses
import os
import signal

import torch

from dalle.files import read_tensors
from dalle.training.train_dvae import TrainDVAEConfig

DATA = "shapes-simple:40"


def dvae_config(out, **change):
    defaults = dict(data=DATA, preset="test", steps=6, batch_size=4, log_every=1, eval_every=4, threads=1)
    return TrainDVAEConfig(out=out, **defaults | change)


def run_through(train, config):
    """Losses by step, result."""
    losses = {}
    result = train(config, on_step=lambda p: losses.setdefault(p.step, p.metrics.get("loss")))
    return losses, result


def run_with_break(train, config, at):
    """The same, stopped by Ctrl-C after step `at` and resumed."""
    losses = {}

    def on_step(progress):
        losses.setdefault(progress.step, progress.metrics.get("loss"))
        if progress.step == at:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(config, on_step=on_step).interrupted
    assert sorted(losses) == list(range(1, at + 1))
    rest, result = run_through(train, dataclasses.replace(config, resume=True))
    assert min(rest) == at + 1
    return losses | rest, result


def assert_same_weights(a, b):
    first, second = read_tensors(a)[0], read_tensors(b)[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
