"""Optional dependencies, grouped into the extras of the distribution (`pip install "dalle-kernels[dalle]"`)."""

from collections.abc import Iterator
from contextlib import contextmanager

from dalle.errors import UserError

EXTRAS = {
    "dalle": ("tokenizers", "safetensors", "huggingface_hub", "PIL", "tyro", "rich"),
    "emoji": ("emoji",),
    "plots": ("matplotlib",),
    "train": ("tensorboard",),
}


class MissingExtra(UserError, ImportError):
    """A package of an extra is not installed. The message gives the command that installs it."""


@contextmanager
def extras() -> Iterator[None]:
    """Within the `with` block, importing a missing package of an extra raises MissingExtra."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        for extra, packages in EXTRAS.items():
            if package in packages:
                raise MissingExtra(
                    f'the package {package} is not installed; run: pip install "dalle-kernels[{extra}]"'
                ) from error
        raise
