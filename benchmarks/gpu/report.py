"""The results: gpu.json with everything, gpu.md with tables, and two plots."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

METHOD = (
    "median over interleaved rounds in one process, random inputs, CUDA events; warm: a graph of many calls; "
    "cold: a graph of one call after the L2 cache was overwritten"
)
READING = [
    "Times in ms, warm / cold. Ratios: baseline time / our time, warm (above 1, ours is faster), with the quartiles",
    "over rounds. TFLOP/s count the allowed pairs; the pair ceiling is dense causal pairs / allowed pairs. Fraction of",
    "the copy bandwidth: minimum memory traffic / cold time / copy bandwidth.",
]


class Results:
    """The results of the stages so far. Every record is written to the folder immediately."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.data = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "method": METHOD, "stages": {}}

    def begin(self, stage: str):
        """Returns `record` for this stage."""
        items = self.data["stages"].setdefault(stage, {})

        def record(item, *, row=None, **facts):
            entry = items.setdefault(item, {"rows": []})
            if row is not None:
                entry["rows"].append(row)
            entry.update(facts)
            self.write()

        return record

    def write(self) -> None:
        for name, text in (("gpu.json", json.dumps(self.data, indent=1) + "\n"), ("gpu.md", page(self.data))):
            part = self._folder / f"{name}.part"
            part.write_text(text)
            part.replace(self._folder / name)


def failures(data: dict) -> list[tuple[str, str, str]]:
    """(stage, item, error) of all items that failed."""
    return [
        (stage, item, entry["error"])
        for stage, items in data["stages"].items()
        for item, entry in items.items()
        if "error" in entry
    ]


def page(data: dict) -> str:
    """A summary as Markdown."""
    machine = next((row for entry in data["stages"].get("machine", {}).values() for row in entry["rows"]), {})
    lines = ["# On a GPU", "", f"- date: {data['date']}", f"- method: {data['method']}"]
    lines += [f"- {key}: {shown(value)}" for key, value in machine.items()]
    lines += ["", *summary(data)]
    rows = [row for items in data["stages"].values() for entry in items.values() for row in entry["rows"]]
    timed = [row for row in rows if "times" in row]
    if timed:
        lines += ["", *READING]
    for op, direction in dict.fromkeys((row["op"], row["pass"]) for row in timed):
        part = [row for row in timed if (row["op"], row["pass"]) == (op, direction)]
        lines += ["", f"## {op}, {direction}"]
        for baselines in dict.fromkeys(tuple(row["times"]) for row in part):
            lines += ["", *comparison([row for row in part if tuple(row["times"]) == baselines])]
    lines += model_lines(data["stages"].get("model", {}))
    for row in rows:
        if "launch table" in row:
            lines += ["", "```python", *row["launch table"], "```"]
    return "\n".join(lines) + "\n"


def summary(data: dict) -> list[str]:
    """One line per stage, and one per failure."""
    lines = ["| stage | items | failed | seconds |", "|---|---|---|---|"]
    for stage, items in data["stages"].items():
        wrong = sum("error" in entry for entry in items.values())
        seconds = sum(entry.get("seconds", 0.0) for entry in items.values())
        lines.append(f"| {stage} | {len(items)} | {wrong} | {seconds:.0f} |")
    broken = failures(data)
    if broken:
        lines += ["", "Failed or skipped:", ""]
        lines += [f"- {stage}, {item}: {' '.join(error.split())}" for stage, item, error in broken]
    return lines


def comparison(rows: list[dict]) -> list[str]:
    """A table of rows with the same columns: all times, and the ratios of the baselines to ours."""
    names = list(rows[0]["times"])
    ours = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    baselines = list(dict.fromkeys(n for row in rows for others in row["ratios"].values() for n in others))
    heads = ["case", *names, *(f"{baseline} / {name}" for name in ours for baseline in baselines)]
    found = {key for row in rows for times in row["times"].values() for key in times}
    extra = [key for key in ("TFLOP/s", "of copy bandwidth", "peak MB") if key in found]
    heads += [f"{name}, {key}" for key in extra for name in ours]
    shares = [name for name in ours if any(name in row.get("share of ceiling", {}) for row in rows)]
    heads += [f"{name}, share of the pair ceiling" for name in shares]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["case"], *(time_cell(row["times"][name]) for name in names)]
        cells += [ratio_cell(row["ratios"].get(name, {}).get(baseline)) for name in ours for baseline in baselines]
        cells += [number(row["times"][name].get(key)) for key in extra for name in ours]
        cells += [number(row.get("share of ceiling", {}).get(name)) for name in shares]
        lines.append("| " + " | ".join(cells) + " |")
    notes = []
    for row in rows:
        for name, times in row["times"].items():
            if "unavailable" in times:
                notes.append(f"- {name}: {times['unavailable']}")
            if "block" in times and "ms" in times:
                tried = ", ".join(row["all"])
                notes.append(f"- {name}, {row['case']}: block {times['block']} is the fastest of {tried}")
            if "why" in times:
                notes.append(f"- {name}, {row['case']}: not captured as a graph: {times['why']}")
    return [*lines, *(["", *dict.fromkeys(notes)] if notes else [])]


def model_lines(items: dict) -> list[str]:
    rows = [row for entry in items.values() for row in entry["rows"]]
    speeds = [row for row in rows if "tokens/s" in row]
    lines = ["", "## The published 12-billion shape", ""] if rows else []
    lines += [f"- {key}: {shown(value)}" for row in rows if row not in speeds for key, value in row.items()]
    if speeds:
        keys = ["backend", "candidates", "tokens/s", "seconds per image"]
        keys += ["ms per step", "ms to read them", "of that time"]
        lines += ["", "| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
        lines += ["| " + " | ".join(shown(row[key]) for key in keys) + " |" for row in speeds]
    return lines


def shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    return number(value) if isinstance(value, float) else "none" if value is None else str(value)


def number(value) -> str:
    """Three significant digits."""
    if value is None:
        return "–"
    return f"{value:.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def time_cell(times: dict) -> str:
    return f"{number(times['ms'][1])} / {number(times['cold ms'][1])}" if "ms" in times else "–"


def ratio_cell(ratio: dict | None) -> str:
    if ratio is None:
        return "–"
    low, middle, high = ratio["warm"]
    return f"**{middle:.2f}** ({low:.2f}–{high:.2f})"


# -- plots


def plot(data: dict, folder: Path) -> None:
    """attention.png: ratios to dense causal attention; bandwidth.png: fraction of the copy bandwidth of the others."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for entry in data["stages"].get("bench", {}).values() for row in entry["rows"] if "times" in row]
    attention, bandwidth = [], []
    for row in rows:
        title = f"{row['op']}, {row['case']}, {row['pass']}"
        if row["op"] == "sparse_attention":
            pairs = ((name, other) for name, others in row["ratios"].items() for other in others)
            attention.append((title, {f"{b} / {name}": row["ratios"][name][b]["warm"][1] for name, b in pairs}))
        else:
            key = "of copy bandwidth"
            bandwidth.append((title, {name: times[key] for name, times in row["times"].items() if key in times}))
    bars(attention, "baseline time / our time", folder / "attention.png")
    bars(bandwidth, "fraction of the copy bandwidth", folder / "bandwidth.png")


def bars(groups: list[tuple[str, dict[str, float]]], label: str, file: Path) -> None:
    """Horizontal bars in groups, one colour per name."""
    from matplotlib import pyplot as plt

    groups = [(title, values) for title, values in groups if values]
    if not groups:
        return
    names = list(dict.fromkeys(name for _, values in groups for name in values))
    figure, axes = plt.subplots(figsize=(10, 1 + 0.35 * len(groups)), layout="constrained")
    for at, name in enumerate(names):
        places = [row + 0.8 * (at + 0.5) / len(names) - 0.4 for row, (_, values) in enumerate(groups) if name in values]
        axes.barh(places, [values[name] for _, values in groups if name in values], 0.8 / len(names), label=name)
    axes.set_yticks(range(len(groups)), [title for title, _ in groups], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=100)
    plt.close(figure)
