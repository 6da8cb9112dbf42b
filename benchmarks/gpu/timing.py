"""Comparative device timing: interleaved rounds A B A B, medians and quartiles.

Warm: a CUDA graph of as many calls as take 2 ms, which excludes Python and launch overhead. Cold: a graph of one call,
after writing a buffer larger than the L2 cache. Both are timed with CUDA events. Functions that cannot be captured are
called directly, and marked as such.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from common.timing import quartiles, reason

ROUNDS = 15
LEAST_SECONDS, MOST_CALLS = 2e-3, 50  # of a warm sample


class HostTimer:
    """Wall-clock time, one call per sample: for a dry run on a CPU."""

    rounds = 1

    def session(self):
        return contextlib.nullcontext()

    def settle(self):
        pass

    def prepare(self, function):
        function()
        return _HostSamples(function)


class _HostSamples:
    def __init__(self, function):
        self._function, self.info = function, {"graph": False}

    def warm(self):
        begin = time.perf_counter()
        self._function()
        return time.perf_counter() - begin

    cold = warm


class CudaTimer:
    rounds = ROUNDS

    def __init__(self):
        # One stream for warm-up, autograd's forward, capture and replay: a backward pass runs on its forward's stream.
        self._stream = torch.cuda.Stream()
        size = max(2**28, 4 * torch.cuda.get_device_properties().L2_cache_size)
        self._flush = torch.empty(size, dtype=torch.uint8, device="cuda")

    @contextlib.contextmanager
    def session(self):
        """Functions that are compared are created, warmed up and measured inside one session."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def settle(self):
        """Raises if an error has left the device unusable."""
        torch.cuda.synchronize()

    def prepare(self, function):
        return _CudaSamples(function, self)

    def seconds(self, function) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def flush(self):
        self._flush.add_(1)


class _CudaSamples:
    def __init__(self, function, timer):
        self._timer = timer
        function()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        once = timer.seconds(function)
        self._calls = min(MOST_CALLS, max(1, round(LEAST_SECONDS / once)))
        try:
            self._one, self._many = capture(function, 1).replay, capture(function, self._calls).replay
            self.info = {"graph": True, "peak MB": peak / 1e6}
        except RuntimeError as error:
            timer.settle()
            self._one, self._many = function, lambda: [function() for _ in range(self._calls)]
            self.info = {"graph": False, "why": str(error).splitlines()[0], "peak MB": peak / 1e6}
        self._many()

    def warm(self):
        return self._timer.seconds(self._many) / self._calls

    def cold(self):
        self._timer.flush()
        return self._timer.seconds(self._one)


def capture(function, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls, captured on the current stream, which must not be the default stream."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin()
    try:
        for _ in range(calls):
            function()
    finally:
        graph.capture_end()
    return graph


def make_timer(setting):
    return CudaTimer() if setting.on_gpu else HostTimer()


def compare(timer, ours: dict[str, Callable], baselines: dict[str, Callable]) -> dict:
    """Times functions against each other. Each value is a factory of the function to time and of its own inputs.

    Returns:
        "times": for every name the quartiles "ms" and "cold ms" and the timer's info, or {"unavailable": reason};
        "ratios": for each of ours and each baseline the quartiles over rounds of baseline time / our time, warm and
        cold: above 1, ours is faster.
    Without a timer, ours are called once, and nothing is measured.
    """
    if timer is None:
        for make in ours.values():
            make()()
        return {"times": {}, "ratios": {}}
    names, times, samples = [*ours, *baselines], {}, {}
    with timer.session():
        for name, make in {**ours, **baselines}.items():
            try:
                samples[name] = timer.prepare(make())
            except Exception as error:
                times[name] = {"unavailable": reason(error)}
                timer.settle()
        rounds = [{name: (samples[name].warm(), samples[name].cold()) for name in samples} for _ in range(timer.rounds)]
        for name in list(samples):  # releases the graphs, whose memory the session frees
            warm, cold = zip(*(r[name] for r in rounds))
            times[name] = {"ms": _ms(warm), "cold ms": _ms(cold), **samples.pop(name).info}
    return {"times": {name: times[name] for name in names}, "ratios": ratios(rounds, ours, baselines)}


def ratios(rounds: list[dict], ours, baselines) -> dict:
    measured = rounds[0].keys() if rounds else ()
    return {
        name: {
            other: {
                kind: quartiles(r[other][index] / r[name][index] for r in rounds)
                for index, kind in enumerate(("warm", "cold"))
            }
            for other in baselines
            if other in measured
        }
        for name in ours
        if name in measured
    }


def _ms(seconds):
    return [value * 1e3 for value in quartiles(seconds)]


def copy_bandwidth(timer, on_gpu: bool) -> float:
    """Bandwidth of a device-to-device copy, in bytes read and written per second."""
    source = torch.randn(2**28 if on_gpu else 2**16, device="cuda" if on_gpu else "cpu")
    target = torch.empty_like(source)
    with timer.session():
        sample = timer.prepare(lambda: target.copy_(source))
        seconds = statistics.median(sample.cold() for _ in range(timer.rounds))
    return 2 * source.nbytes / seconds
