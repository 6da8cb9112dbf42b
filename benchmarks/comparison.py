"""Comparative timing, in interleaved rounds A B A B in one process."""

import math
import os
import statistics
import time

import torch
from common import timing
from common.setting import Setting
from common.timing import Unavailable, quartiles

SETTING = Setting("cpu", tiny=os.environ.get("DALLE_BENCH") == "tiny")  # tiny: all code on small sizes, as a test
ROUNDS = 1 if SETTING.tiny else 11


def seconds(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def compare(functions: dict, rounds: int = ROUNDS, least: float = 0.0) -> tuple[dict, dict]:
    """Times every function after a warm-up, in samples of at least `least` seconds.

    Returns:
        Seconds as quartiles over rounds, and for all but the first function the quartiles of the ratio to the first:
        above 1, the first is faster.
    """
    for function in functions.values():
        function()
    calls = dict.fromkeys(functions, 1)
    if least:
        calls = {name: math.ceil(least / seconds(function)) for name, function in functions.items()}

    def sample(name):
        function, count = functions[name], calls[name]
        begin = time.perf_counter()
        for _ in range(count):
            function()
        return (time.perf_counter() - begin) / count

    samples = [{name: sample(name) for name in functions} for _ in range(rounds)]
    first, *others = functions
    times = {name: quartiles(s[name] for s in samples) for name in functions}
    ratios = {name: quartiles(s[name] / s[first] for s in samples) for name in others}
    return times, ratios


def attempt(make):
    """make(), or the Unavailable that it raises."""
    try:
        return make()
    except Unavailable as error:
        return error


def fastest(functions):
    """The fastest of several equivalent functions: the median of three calls after a warm-up."""

    def median(function):
        function()
        return statistics.median(seconds(function) for _ in range(1 if SETTING.tiny else 3))

    return min(functions, key=median)


def compiled(function):
    """As `common.timing.compiled`, for a CPU; on tiny sizes, graph capture without code generation."""
    torch.compiler.reset()
    if SETTING.tiny:
        return torch.compile(function, dynamic=False, backend="eager")
    need_compiler()
    return timing.compiled(function)


def need_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise Unavailable("torch.compile finds no C++ compiler") from error
