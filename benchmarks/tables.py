"""Results of benchmarks as rows, JSON and Markdown tables."""

import datetime
import json
import platform
import shlex
import sys
from pathlib import Path

import torch
from common.machine import processor
from common.timing import Unavailable

import dalle_kernels.info

READING = "Ratios: baseline time / our time (above 1, ours is faster), with the quartiles over rounds."
UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6}


def conditions(method: str) -> dict:
    build = dalle_kernels.info.collect()["build"]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instruction set": build.get("cpu_isa_active"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": build.get("compiler"),
        "command": shlex.join(["python", "-m", "pytest", *sys.argv[1:]]),
        "method": method,
    }


def suffix() -> str:
    """The suffix of file names: "-cpu", and the instruction set if it is not the best one on this machine."""
    build = dalle_kernels.info.collect()["build"]
    active, here = build.get("cpu_isa_active"), build.get("cpu_isas_here", [None])
    return "-cpu" if active == here[-1] else f"-cpu-{active}"


def write(folder: Path, name: str, rows: list[dict], facts: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (name + suffix())
    file.with_suffix(".json").write_text(json.dumps({"conditions": facts, "rows": rows}, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(name, rows, facts))


def page(name: str, rows: list[dict], facts: dict) -> str:
    lines = [f"# {name}, CPU", "", *(f"- {key}: {value}" for key, value in facts.items()), "", READING]
    for test in dict.fromkeys(row["test"] for row in rows):
        lines += ["", *section(test, [row for row in rows if row["test"] == test])]
    return "\n".join(lines) + "\n"


def section(test: str, rows: list[dict]) -> list[str]:
    """The table of one test, and the reasons for missing baselines."""
    cells = [row_cells(row) for row in rows]
    columns = list(dict.fromkeys(column for row in cells for column in row))
    lines = [f"## {test.removeprefix('test_').replace('_', ' ')}", "", " ".join(rows[0]["about"].split()), ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row.get(column, "") for column in columns) + " |" for row in cells]
    missing = dict.fromkeys(f"{name}: {why}." for row in rows for name, why in row["unavailable"].items())
    return lines + (["", *missing] if missing else [])


def row_cells(row: dict) -> dict[str, str]:
    cells, unit = {"case": row["case"]}, row["unit"]
    for name in [*row["seconds"], *row["unavailable"]]:
        cells[f"{name}, {unit}"] = number(amount(row, name)) if name in row["seconds"] else "—"
        if name in row["ratios"]:
            low, middle, high = row["ratios"][name]
            cells[f"{name}, ratio"] = f"**{middle:.2f}** ({low:.2f}–{high:.2f})"
    return cells | {key: value if isinstance(value, str) else number(value) for key, value in row["facts"].items()}


def amount(row: dict, name: str) -> float:
    """A time in the row's unit, or a rate per second."""
    median = row["seconds"][name][1]
    return median * UNITS[row["unit"]] if row["unit"] in UNITS else row["count"] / median


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def missing(functions: dict) -> dict[str, str]:
    return {name: str(value) for name, value in functions.items() if isinstance(value, Unavailable)}
