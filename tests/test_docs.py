"""The pages name files that exist, link to headings that exist, and state numbers that the code gives."""

import re
from pathlib import Path

import pytest

import dalle_kernels as dk
from dalle_kernels.decode_schedule import compile_schedule
from dalle_kernels.plan import compile_plan

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
FOLDERS = "benchmarks|csrc|dalle|dalle_kernels|docs|examples|recipes|tests"
DESIGN = (ROOT / "docs/design.md").read_text(encoding="utf-8")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What links to the page's headings may name, by the rule of GitHub."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_named_files_exist(page):
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pages
def test_links_lead_somewhere(page):
    for link in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


P = dk.AttentionPattern
PAPER = {
    "`row`": P.row,
    "`column`": P.column,
    "`conv`, 11×11, wrap": P.conv,
    "`conv`, 11×11, clip": lambda text, grid: P.conv(text, grid, edge="clip"),
    "`conv`, 11×11, torus": lambda text, grid: P.conv(text, grid, edge="torus"),
    "`axial_row`": P.axial_row,
    "`corner_conv`, 5×5": P.corner_conv,
    "`causal`": P.causal,
}


@pytest.mark.parametrize("name", PAPER)
def test_numbers_at_the_papers_size(name):
    pattern = PAPER[name](256, (32, 32))
    schedule = compile_schedule(pattern)
    reads = [len(schedule.image_slots(step)) for step in range(1024)]
    cells = [
        f"{pattern.nnz:,}",
        f"{pattern.nnz / P.causal(256, (32, 32)).nnz:.0%}".replace("%", " %"),
        f"{compile_plan(pattern, pattern.seq_len).pairs:,}",
        f"{schedule.slots:,}",
        f"{sum(reads) / len(reads):.1f} ({max(reads):,})",
    ]
    assert f"| {name} | {' | '.join(cells)} |" in DESIGN


def test_the_triton_page_shows_the_code_as_it_is():
    page = (ROOT / "docs/triton.md").read_text(encoding="utf-8")
    files = (ROOT / "dalle_kernels/backends/triton").glob("*.py")
    code = {line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()}
    _, *blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)  # the first is for a user
    shown = {line.strip() for block in blocks for line in block.splitlines()}
    assert len(shown) > 25 and shown <= code, shown - code
