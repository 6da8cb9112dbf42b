"""Text tables of an evaluation."""

from collections.abc import Iterable

from dalle.evaluation.shapes import ATTRIBUTES


def table(report: dict) -> str:
    """Formats the result of `evaluate` as aligned columns."""
    sections = {
        "dvae": _dvae,
        "prior": _prior,
        "retrieval": _retrieval,
        "ranks": _ranks,
        "shapes": _shapes,
        "candidates": _candidates,
    }
    lines = [line for name, write in sections.items() if name in report for line in ["", *write(report[name])]]
    return "\n".join([*lines, "", *report["notes"]]).strip()


def _dvae(section: dict) -> list[str]:
    rows = []
    for name, x in section.items():
        used = f"{x['codes in use']} of {x['codes']}"
        numbers = f"{x['PSNR, dB']:.2f}", f"{x['SSIM']:.3f}", used, f"{x['perplexity']:.0f}"
        rows.append([name, str(x["images"]), *numbers])
    return _columns(["dVAE", "images", "PSNR, dB", "SSIM", "codes in use", "perplexity"], rows)


def _prior(section: dict) -> list[str]:
    rows = [
        [name, str(x["captions"]), f"{x['nats per text token']:.3f}", f"{x['nats per image token']:.3f}"]
        for name, x in section.items()
    ]
    return _columns(["prior, nats per token", "captions", "text", "image"], rows)


def _retrieval(section: dict) -> list[str]:
    lines = []
    for name, entries in section.items():
        count = next(iter(entries.values()))["top-1"]["total"]
        rows = [[kind, *(_percent(x[top]) for top in ("top-1", "top-5"))] for kind, x in entries.items()]
        lines += _columns([f"CLIP retrieval among {count}, %, {name}", "top-1", "top-5"], rows)
    return lines


def _ranks(section: dict) -> list[str]:
    lines = [f"rank of the caption's image among {section['images']}, 16x16 pixels, %"]
    for name, entries in section.items():
        if name == "images":
            continue
        tops = [top for top in next(iter(entries.values())) if top.startswith("top-")]
        rows = [[kind, *(_percent(x[top]) for top in tops), f"{x['median rank']:g}"] for kind, x in entries.items()]
        count = next(iter(entries.values()))[tops[0]]["total"]
        lines += _columns([f"{name}, {count} captions", *tops, "median"], rows)
    return lines


def _shapes(section: dict) -> list[str]:
    lines = ["attributes of shapes that match the caption, %"]
    for name, entries in section.items():
        names = [attribute for attribute in ATTRIBUTES if attribute in next(iter(entries.values()))]
        rows = [[kind, *(_percent(x[attribute], interval=attribute == "joint") for attribute in names)]
                for kind, x in entries.items()]  # fmt: skip
        count = next(iter(entries.values()))["joint"]["total"]
        lines += _columns([f"{name}, {count} captions", *names], rows)
    return lines


def _candidates(section: dict) -> list[str]:
    lines = ["joint accuracy of the best of N candidates, %"]
    for name, entries in section.items():
        joint = entries["joint"]
        rows = [[kind, *(f"{100 * value:.0f}" for value in joint[kind])] for kind in ("ranked", "oracle")]
        lines += _columns([f"{name}, {joint['captions']} captions", *map(str, joint["candidates"])], rows)
    return lines


def _percent(entries: dict, interval: bool = True) -> str:
    low, high = entries["95 %"]
    return f"{100 * entries['proportion']:.1f}" + (f" ({100 * low:.1f}–{100 * high:.1f})" if interval else "")


def _columns(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A heading and indented rows; columns are as wide as their widest cell."""
    cells = [head, *(["  " + row[0], *row[1:]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in cells
    ]
