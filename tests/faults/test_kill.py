"""Training that is killed with SIGKILL at random moments, many of them within a save, and resumed."""

import dataclasses
import multiprocessing
import random
import signal
import time

from training_for_tests import assert_same_weights, dvae_config

from dalle import DiscreteVAEConfig
from dalle.training.train_dvae import train_dvae

STEPS = 16
MODEL = DiscreteVAEConfig(16, 32, (8, 16, 16), blocks=1, codebook_dim=8)


def train(config, kill_after=None):
    """Trains in a child process and returns the seconds from the first step to its end. If these would exceed
    `kill_after`, the child is killed, and the result is None.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: train_dvae(config, on_step=lambda p: sender.send(p.step)))
    child.start()
    assert receiver.poll(60), "no step was done in a minute"
    began = time.monotonic()
    child.join(kill_after)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return time.monotonic() - began if child.exitcode == 0 else None


def test_training_killed_at_random_moments_resumes_exactly(tmp_path, seed):
    chance, out = random.Random(seed), tmp_path / "killed"
    config = dvae_config(tmp_path / "whole", model=MODEL, steps=STEPS, save_every=1, eval_every=0)
    seconds, kills = train(config), 0
    while train(
        dataclasses.replace(config, out=out, resume=(out / "dvae.run.safetensors").exists()),
        kill_after=chance.uniform(0, seconds / 2),
    ) is None:  # fmt: skip
        kills += 1
    assert kills
    for name in ("dvae.safetensors", "dvae.run.safetensors"):
        assert_same_weights(tmp_path / "whole" / name, out / name)
