"""Training that is killed with SIGKILL at random moments, many of them within a save, and resumed."""

import dataclasses
import random
import signal
import time

from processes_for_tests import server
from training_for_tests import assert_same_weights, dvae_config

from dalle import DiscreteVAEConfig
from dalle.training.train_dvae import train_dvae

STEPS = 16
MODEL = DiscreteVAEConfig(16, 32, (8, 16, 16), blocks=1, codebook_dim=8)


def train(config, pipe):
    """Trains, and sends the number of every step."""
    train_dvae(config, on_step=lambda progress: pipe.send(progress.step))


def train_until(config, steps, seconds):
    """Trains in a process that is killed `seconds` after `steps` more steps. Returns whether it was too late."""
    ours, theirs = server().Pipe(duplex=False)
    process = server().Process(target=train, args=(config, theirs))
    process.start()
    theirs.close()
    try:
        for _ in range(steps):
            ours.recv()
        time.sleep(seconds)
    except EOFError:
        pass  # it has ended
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def test_training_killed_at_random_moments_resumes_exactly(tmp_path, seed):
    chance, out = random.Random(seed), tmp_path / "killed"
    config = dvae_config(tmp_path / "whole", model=MODEL, steps=STEPS, save_every=1, eval_every=0)
    began = time.monotonic()
    train_dvae(config)
    step = (time.monotonic() - began) / STEPS
    late, kills = False, 0
    while not late:
        resume = (out / "dvae.run.safetensors").exists()
        again = dataclasses.replace(config, out=out, resume=resume)
        late = train_until(again, steps=chance.randrange(1, 4), seconds=chance.uniform(0, step))
        kills += not late
    assert kills
    for name in ("dvae.safetensors", "dvae.run.safetensors"):
        assert_same_weights(tmp_path / "whole" / name, out / name)
