"""Fixtures for benchmarks: `versus` times one of our functions against named baselines; `record` stores other numbers.
A run writes its tables and the plot to benchmarks/results/ (--results).
"""

from pathlib import Path

import plots
import pytest
import tables
from comparison import ROUNDS, SETTING, compare

_rows: dict[str, list[dict]] = {}


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the results")


@pytest.fixture
def record(benchmark, request):
    """record(facts) adds a row of columns to the table of the test; `versus` passes its measurements in the rest."""

    def run(facts, seconds=(), ratios=(), unavailable=(), unit="", count=1, ours=lambda: None):
        row = {
            "test": request.node.originalname,
            "about": (request.function.__doc__ or "").strip(),
            "case": request.node.callspec.id,
            "parameters": {key: str(value) for key, value in request.node.callspec.params.items()},
            "unit": unit,
            "count": count,
            "seconds": dict(seconds),
            "ratios": dict(ratios),
            "unavailable": dict(unavailable),
            "facts": facts,
        }
        if not benchmark.disabled:
            _rows.setdefault(request.module.__name__.removeprefix("bench_"), []).append(row)
        benchmark.extra_info.update(row)
        benchmark.pedantic(ours, rounds=1)

    return run


@pytest.fixture
def versus(benchmark, record):
    """versus(ours, {name: baseline}): measures times in `unit` or, for a unit such as "images/s", rates (`count` per
    call).

    A baseline may be Unavailable; the table then gives the reason. `facts` are additional columns; `derived` columns
    are a factor times our seconds.
    """

    def run(ours, baselines, *, rounds=ROUNDS, least=0.0, unit="ms", count=1, facts=None, derived=None):
        functions = {"ours": ours, **baselines}
        unavailable = tables.missing(functions)
        measured = {name: function for name, function in functions.items() if name not in unavailable}
        times, ratios = compare(measured, 1 if benchmark.disabled or SETTING.tiny else rounds, least)
        facts = {**{name: factor * times["ours"][1] for name, factor in (derived or {}).items()}, **(facts or {})}
        record(facts, times, ratios, unavailable, unit, count, ours)

    return run


def pytest_sessionfinish(session):
    if not _rows:
        return
    method = f"median of {ROUNDS} interleaved rounds (fewer where a table says so) in one process after a warm-up"
    conditions, folder = tables.conditions(method), session.config.getoption("results")
    for name, rows in _rows.items():
        tables.write(folder, name, rows, conditions)
    try:
        plots.plot(folder, tables.suffix())
    except ImportError:
        print("\nno plot: matplotlib is not installed")
