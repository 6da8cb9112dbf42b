"""`versus`: times one of our functions against named baselines, interleaved, and writes the ratios of a whole run to
benchmarks/results/.
"""

import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
ROUNDS = 11
_rows: dict[str, list[dict]] = {}


def _seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


@pytest.fixture
def versus(benchmark, request):
    """versus(ours, baseline=function, ...): medians over rounds A B C A B C ... after a warm-up, and the median of
    the per-round ratios.
    """

    def run(ours, **baselines):
        functions = {"ours": ours, **baselines}
        for function in functions.values():
            function()
            function()
        rounds = [{name: _seconds(function) for name, function in functions.items()} for _ in range(ROUNDS)]
        row = {"case": request.node.callspec.id, "ms": statistics.median(r["ours"] for r in rounds) * 1e3}
        for name in baselines:
            ratios = sorted(r[name] / r["ours"] for r in rounds)
            row[name] = {
                "ms": statistics.median(r[name] for r in rounds) * 1e3,
                "ratio": statistics.median(ratios),
                "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            }
        _rows.setdefault(request.module.__name__.removeprefix("bench_"), []).append(
            {"test": request.node.originalname, **row}
        )
        benchmark.extra_info.update(row)
        benchmark.pedantic(ours, rounds=3)

    return run


def _processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def pytest_sessionfinish(session):
    if not _rows:
        return
    import dalle_kernels.info

    info = dalle_kernels.info.collect()
    conditions = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction set": info["build"].get("cpu_isa_active"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": info["build"].get("compiler"),
        "command": " ".join(["python -m pytest", *sys.argv[1:]]),
        "method": f"median of {ROUNDS} interleaved rounds in one process after a warm-up, random inputs",
    }
    RESULTS.mkdir(exist_ok=True)
    for name, rows in _rows.items():
        (RESULTS / f"{name}-cpu.json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
        (RESULTS / f"{name}-cpu.md").write_text(_table(name, rows, conditions))


def _table(name, rows, conditions):
    lines = [f"# {name}, CPU", "", *(f"- {key}: {value}" for key, value in conditions.items()), ""]
    lines.append("Ratios: baseline time / our time (above 1, ours is faster), with the quartiles over rounds.")
    for test in dict.fromkeys(row["test"] for row in rows):
        part = [row for row in rows if row["test"] == test]
        baselines = [key for key in part[0] if isinstance(part[0][key], dict)]
        headings = " | ".join(f"{b.replace('_', ' ')}, ms | ratio" for b in baselines)
        lines += ["", f"## {test.removeprefix('test_').replace('_', ' ')}", ""]
        lines += [f"| case | ours, ms | {headings} |", "|---" * (2 + 2 * len(baselines)) + "|"]
        for row in part:
            cells = [row["case"], f"{row['ms']:.2f}"]
            for b in (row[baseline] for baseline in baselines):
                cells += [f"{b['ms']:.2f}", f"**{b['ratio']:.2f}** ({b['quartiles'][0]:.2f}–{b['quartiles'][1]:.2f})"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
