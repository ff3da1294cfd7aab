"""Results of slow programs, created once per test session and shared by all test workers."""

import os

from filelock import FileLock


def once(tmp_path_factory, name, make):
    """Returns the folder `name` of this session, which `make(folder)` fills the first time.

    pytest-xdist has a session per worker; its workers share the folder through the parent of their
    temporary folders. Tests must not change it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            assert not folder.exists(), f"{name} failed in an earlier test"
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
