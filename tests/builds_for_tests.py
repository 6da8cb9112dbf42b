"""Builds shared by the processes of a test run."""

import fcntl
import os
import shutil


def once(tmp_path_factory, name, build):
    """A folder filled by build(folder), which is called once per test run, by the first process that needs it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers' folders are siblings
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a failed attempt
            folder.mkdir()
            build(folder)
            done.touch()
    return folder
