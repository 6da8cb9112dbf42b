"""Stage model: the published 12-billion shape with random weights in bfloat16.

Measures the speed of generating image tokens for several numbers of candidates of one prompt, compared with the time to
read the weights and keys of a step once, and the maximum number of candidates that fit. The time of a step is the
difference between generating the last `MANY` and the last `FEW` codes of a given image, which cancels the prompt and
the set-up.
"""

from __future__ import annotations

import gc
import statistics
import time

import torch

import dalle_kernels as dk
from dalle.generation.sampler import generate_codes, sequence_bytes
from dalle.models.prior import Prior, PriorConfig
from dalle_kernels.decode_schedule import compile_schedule

from .timing import copy_bandwidth, make_timer

CANDIDATES = (1, 8, 64, 512)
FEW, MANY, REPEATS = 8, 32, 3


def items(setting):
    bench = ModelBench(setting)
    candidates = (1, 2) if setting.tiny else CANDIDATES
    yield "weights", lambda: [bench.load()]
    for backend in setting.backends():
        for count in candidates:
            yield f"{backend}: {count} candidates", lambda c=(backend, count): [bench.row(*c)]
        yield f"{backend}: most candidates", lambda backend=backend: bench.most(backend)


class ModelBench:
    def __init__(self, setting):
        self.setting = setting
        self.prior = None

    def load(self) -> dict:
        """Creates the model on the first call."""
        if self.prior is None:
            self.bandwidth = copy_bandwidth(make_timer(self.setting), self.setting.on_gpu)
            began = time.monotonic()
            self.prior = make_prior(self.setting)
            self.seconds = time.monotonic() - began
        return {
            "parameters": sum(p.numel() for p in self.prior.parameters()),
            "seconds to make": self.seconds,
            "copy, GB/s": self.bandwidth / 1e9,
        }

    def row(self, backend: str, candidates: int) -> dict:
        self.load()
        prior, (few, many) = self.prior, (1, 3) if self.setting.tiny else (FEW, MANY)
        with dk.use_backend(backend):
            self.generate(candidates, few)
            repeats = 1 if self.setting.tiny else REPEATS
            steps = [
                (self.generate(candidates, many) - self.generate(candidates, few)) / (many - few)
                for _ in range(repeats)
            ]
        step = statistics.median(steps)
        bytes_read = step_bytes(prior, candidates, many - few)
        floor = bytes_read / self.bandwidth
        return {
            "backend": backend,
            "candidates": candidates,
            "ms per step": step * 1e3,
            "all, ms": [s * 1e3 for s in steps],
            "tokens/s": candidates / step,
            "seconds per image": step * prior.config.image_len / candidates,
            "bytes per step": bytes_read,
            "ms to read them": floor * 1e3,
            "of that time": step / floor,
        }

    def most(self, backend: str):
        """The most candidates that fit, estimated by sequence_bytes and then tried, and a row with their speed."""
        self.load()
        if not self.setting.on_gpu:
            raise NotImplementedError("the largest number of candidates is determined on CUDA only")
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        guess = most_by_estimate(self.prior, free)
        with dk.use_backend(backend):
            fits = largest(guess, self.fits)
        yield {"most candidates": fits, "by sequence_bytes": guess, "free GB": free / 1e9}
        if fits:
            yield self.row(backend, fits)

    def fits(self, candidates: int) -> bool:
        try:
            self.generate(candidates, FEW)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return True

    def generate(self, candidates: int, count: int) -> float:
        """Seconds to generate the last `count` codes of a random image."""
        config, device = self.prior.config, self.setting.device
        text = self.prior.pack_text([[1, 2, 3]])
        given = torch.randint(config.image_vocab, (1, config.image_len), device=device)
        resample = torch.arange(config.image_len).view(config.grid) >= config.image_len - count
        synchronize(self.setting)
        began = time.perf_counter()
        generate_codes(self.prior, text, candidates=candidates, given=given, resample=resample)
        synchronize(self.setting)
        return time.perf_counter() - began


def make_prior(setting) -> Prior:
    config = PriorConfig.preset("tiny" if setting.tiny else "dalle-12b")
    saved = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if setting.tiny else torch.bfloat16)
    try:
        with torch.device(setting.device):
            return Prior(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(saved)


def synchronize(setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize()


def step_bytes(prior: Prior, candidates: int, steps: int) -> int:
    """Mean bytes read by one of the last `steps` steps: the weights of the layers and of the image head, and the keys
    and values that the patterns allow, the text's once for all candidates."""
    config = prior.config
    weights = sum(p.nbytes for part in (prior.layers, prior.norm, prior.image_head) for p in part.parameters())
    text = image = 0
    for pattern in config.schedule():
        schedule = compile_schedule(pattern)
        last = range(config.image_len - steps, config.image_len)
        text += sum(len(schedule.text_keys(step)) for step in last)
        image += sum(len(schedule.image_slots(step)) for step in last)
    key_and_value = 2 * config.width * prior.image_head.weight.element_size()
    return weights + (text + candidates * image) * key_and_value // steps


def most_by_estimate(prior: Prior, free: int) -> int:
    """The most candidates whose sequence_bytes fit in `free`."""
    low, high = 0, 2**16
    while low < high:
        middle = (low + high + 1) // 2
        if middle * sequence_bytes(prior, middle) <= free:
            low = middle
        else:
            high = middle - 1
    return low


def largest(guess: int, fits) -> int:
    """About the largest number that fits, from `guess` up or down in steps of 1/32; 0 if none of 8 tries fits."""
    step = max(1, guess // 32)
    if fits(guess):
        return guess + step if fits(guess + step) else guess
    for _ in range(6):
        guess -= step
        if guess < 1 or fits(guess):
            return max(0, guess)
    return 0
