"""Builds that the processes of a test run share."""

import fcntl
import os
import shutil


def once(tmp_path_factory, name, build):
    """A folder filled by build(folder), which only the first process calls that comes here in this run of the tests."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose folders lie side by side
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
            folder.mkdir()
            build(folder)
            done.touch()
    return folder
