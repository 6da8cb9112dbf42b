"""Every code block of the README, of CONTRIBUTING.md and of docs/ runs, or says why it cannot.

A block stands by itself. sh blocks run in a folder with images and a model, python blocks of pages with diffs in a copy
of the sources to which the diffs are applied. Trainings are cut to one step.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from dalle import CLIP, CLIPConfig, DiscreteVAE, DiscreteVAEConfig, Pipeline, Prior, PriorConfig
from dalle.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]

# Lines of sh that are not run, by how they begin, and why.
NOT_RUN = {
    r"pip install|cibuildwheel|python -m build": "installs or builds packages; test_distribution.py does so too",
    r"(OUT=\S+ )?make ": "sets up an environment or needs a GPU; the Makefile is how these tests are run",
    r"dalle convert": "needs the weights of other projects; the tests of conversion build small ones",
    r"python -m twine|git tag": "publishes a release",
    r"TRITON_INTERPRET=1 python -m pytest": "takes minutes; `make test-slow` runs these tests in the interpreter",
    r"python setup.py|cmake --build": "builds; test_the_build_runs does in a copy",
    r"dalle convert|dalle \w+ .*--model (malevich|openai)\b": "needs the published weights of other projects",
}
SCRIPTS = {path.read_text(encoding="utf-8"): path.name for path in ROOT.glob("examples/*.py")}
# Python that quotes the sources, and what compares it with them.
QUOTED = {"docs/triton.md": "quotes the sources; test_docs.py compares them"}
SHORTER = (
    (r"--minutes \d+", "--steps 1 --batch-size 2 --threads 1"),
    (r"--preset \w+", "--preset tiny"),
    (r"--candidates \d+", "--candidates 2"),
    (r"--top \d+", "--top 1"),
    (r"candidates=\d+, top=\d+", "candidates=2, top=1"),
    (r"candidates=16", "candidates=2"),
    (r"^dalle evaluate", "dalle evaluate --captions 2 --candidates 2 --ranked 2 --threads 1"),
)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str


def blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^( *)```(\w+)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
            indent, language, code = match.groups()
            line = text.count("\n", 0, match.start()) + 1
            yield Block(str(page.relative_to(ROOT)), line, language, re.sub(f"^{indent}", "", code, flags=re.MULTILINE))


BLOCKS = list(blocks())
of = {language: [block for block in BLOCKS if block.language == language] for language in ("python", "sh", "diff")}


def each(language):
    slow = re.compile("dalle (train|evaluate)")
    cases = [
        pytest.param(
            block, id=f"{block.page}:{block.line}", marks=[pytest.mark.slow] if slow.search(block.code) else []
        )
        for block in of[language]
    ]
    return pytest.mark.parametrize("block", cases)


def environment(tmp_path):
    """Of this Python, with the sources here and a command `dalle` whether or not it is installed."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, arguments in (("python", ""), ("dalle", " -m dalle")):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        (bin_folder / name).chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(command, cwd, env):
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def shorter(code):
    for pattern, replacement in SHORTER:
        code = re.sub(pattern, replacement, code)
    return code


def test_every_block_is_of_a_kind_that_is_run():
    assert len(BLOCKS) > 20
    assert [block for block in BLOCKS if block.language not in of] == []


@each("python")
def test_python_runs(block, tmp_path, monkeypatch):
    first = next(other for other in of["python"] if other.page == block.page)
    if block.page in QUOTED and block is not first:
        pytest.skip(QUOTED[block.page])
    if block.code in SCRIPTS and re.search(r"^(from|import) (?!torch|dalle_kernels)", block.code, re.MULTILINE):
        pytest.skip(f"needs a package of others; test_example_scripts.py runs it, examples/{SCRIPTS[block.code]}")
    patches = [diff for diff in of["diff"] if diff.page == block.page]
    if patches:
        env = environment(tmp_path) | {"PYTHONPATH": str(patched_copy(tmp_path, patches))}
        run([sys.executable, "-c", block.code], tmp_path, env)
    else:
        monkeypatch.chdir(tmp_path)
        exec(compile(shorter(block.code), f"{block.page}:{block.line}", "exec"), {})


def patched_copy(tmp_path, patches):
    """A folder with the packages, to which the page's diffs are applied."""
    if shutil.which("git") is None:
        pytest.skip("git, which applies the diff, is not installed")
    copy = tmp_path / "copy"
    for package in ("dalle", "dalle_kernels"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for patch in patches:
        (copy / "change.diff").write_text(patch.code)
        run(["git", "apply", "--recount", "change.diff"], copy, None)
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages assume: captioned images, an image, and a trained model."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "images").mkdir()
    for i in range(60):
        Image.new("RGB", (40, 32), (4 * i, 255 - 4 * i, 128)).save(folder / f"images/{i}.png")
        (folder / f"images/{i}.txt").write_text(f"a colour with {i} parts of red\n")
    shutil.copy(folder / "images/7.png", folder / "image.png")
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a red barn in the snow"], 300)
    dvae = DiscreteVAE(DiscreteVAEConfig(16, 32, (8, 8, 16), blocks=1, codebook_dim=8, codebook_std=1.0))
    prior = Prior(PriorConfig(32, tokenizer.vocab_size, (4, 4), 32, layers=2, heads=2, head_dim=16, conv_kernel=3))
    size = CLIPConfig(16, 32, tokenizer.vocab_size, (8, 16), text_width=16, text_layers=1, text_heads=2)
    Pipeline(dvae, prior, tokenizer, CLIP(size)).save_pretrained(folder / "model")
    return folder


@each("sh")
def test_shell_lines_run(block, tmp_path, folder):
    commands, reasons = [], []
    for line in filter(None, block.code.splitlines()):
        why = [reason for begin, reason in NOT_RUN.items() if re.match(begin, line)]
        reasons += why
        if not why:
            commands.append(shorter(line))
    for reason in dict.fromkeys(reasons):
        print(f"not run: {reason}")
    if not commands:
        pytest.skip("; ".join(dict.fromkeys(reasons)))
    here = tmp_path / "here"
    shutil.copytree(folder, here)
    for name in ("tests", "pyproject.toml"):
        (here / name).symlink_to(ROOT / name)
    if "--out model" in block.code:
        shutil.rmtree(here / "model")
    run(["bash", "-e", "-x", "-c", "\n".join(commands)], here, environment(tmp_path))


def test_the_drop_in_example_trains(seed):
    (code,) = [block.code for block in of["python"] if block.page == "docs/kernels.md" and "optimizer" in block.code]
    losses = []
    code = code.replace("optimizer.zero_grad()", "losses.append(loss.item()), optimizer.zero_grad()")
    exec(compile(code, "docs/kernels.md", "exec"), {"losses": losses})
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert torch.isfinite(torch.tensor(losses)).all()


@pytest.mark.slow
@pytest.mark.full
def test_the_build_runs(tmp_path):
    """The lines of CONTRIBUTING.md that build, in a copy of the sources."""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "__pycache__", "results")
    )
    [code] = [block.code for block in of["sh"] if block.page == "CONTRIBUTING.md" and "setup.py" in block.code]
    env = environment(tmp_path) | {"DALLE_CUDA": "0", "PYTHONPATH": str(copy)}
    said = run(["bash", "-e", "-x", "-c", code], copy, env)
    assert "cpu: loaded" in said
