"""The scripts in examples/ run, where the package that they are about is installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
PEERS = ("dalle_pytorch", "rudalle")  # they run with stand-ins for packages that they import and do not need
WITH_STUBS = "import runpy, sys; from packages_for_tests import stubs\nwith stubs(): runpy.run_path(sys.argv[1])"


def packages(script):
    """The packages that a script imports, besides PyTorch and ours."""
    names = re.findall(r"^(?:from|import) (\w+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    return set(names) - {"torch", "dalle_kernels"}


@scripts
def test_at_most_ten_lines(script):
    assert sum(bool(line.strip()) for line in script.read_text(encoding="utf-8").splitlines()) <= 10


@pytest.mark.slow
@scripts
def test_runs(script, tmp_path):
    for package in packages(script):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; run: pip install --no-deps {package}")
    launcher = [sys.executable, "-W", "ignore"]
    if packages(script) & set(PEERS):
        launcher += ["-c", WITH_STUBS]
    if "torchrun" in script.read_text(encoding="utf-8"):
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launcher, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", run.stdout)]
    assert losses or "lightning" in script.stem, run.stdout
    assert "replaced" in run.stdout or "patch" not in script.stem
