"""A package of an extra that is not installed is named in one sentence, with the command that installs it."""

import subprocess
import sys

import pytest

from dalle.extras import EXTRAS, MissingExtra, extras

# What uses a package, run in a process of its own where the package cannot be imported.
USES = {
    "tyro": "import sys; from dalle.cli import main; sys.exit(main(['generate', 'red heart']))",
    "tokenizers": "import sys; from dalle.cli import main; sys.exit(main(['generate', 'red heart']))",
    "PIL": "import dalle; dalle.Pipeline",
    "emoji": "import sys; from dalle.data import open_source; open_source('emoji', 64)",
    "tensorboard": (
        "from pathlib import Path; from dalle.training import loop;"
        "loop._Logger(loop.TrainConfig(out=Path('.'), tensorboard=True), None)"
    ),
    "matplotlib": "from pathlib import Path; from dalle.evaluation.plots import plot; plot({}, Path('.'))",
}


@pytest.mark.parametrize("package", USES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, tmp_path):
    code = f"import sys; sys.modules[{package!r}] = None; {USES[package]}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    [extra] = [extra for extra, packages in EXTRAS.items() if package in packages]
    said = f'the package {package} is not installed; run: pip install "dalle-kernels[{extra}]"'
    last = result.stderr.strip().splitlines()[-1]
    if "dalle.cli" in code:
        assert (result.returncode, result.stderr.strip()) == (2, f"dalle: {said}")
    else:
        assert (result.returncode, last) == (1, f"dalle.extras.MissingExtra: {said}")


def test_it_is_an_import_error():
    with pytest.raises(ImportError) as caught, extras():
        raise ModuleNotFoundError("No module named 'rich.console'", name="rich.console")
    assert isinstance(caught.value, MissingExtra) and "package rich" in str(caught.value)


def test_other_missing_modules_stay_what_they_are():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), extras():
        import no_such_module  # noqa: F401


def test_the_core_needs_torch_and_numpy_only():
    packages = [package for names in EXTRAS.values() for package in names]
    code = f"import sys; sys.modules.update(dict.fromkeys({packages!r})); import dalle_kernels.info; import dalle"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
