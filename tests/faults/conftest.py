"""A trained model to damage."""

import shutil

import pytest

from faults.models_for_tests import build


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A model directory with every kind of file; not to be changed."""
    directory = tmp_path_factory.mktemp("faults") / "model"
    build(directory)
    return directory


@pytest.fixture
def model(built, tmp_path):
    """A copy of it."""
    return shutil.copytree(built, tmp_path / "model")
