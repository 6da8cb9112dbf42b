"""The build backend of setuptools, except that building an sdist does not require torch."""

from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_sdist(config_settings=None):
    """Nothing: the inherited hook asks setup.py, which requires torch to compile a wheel."""
    return []
