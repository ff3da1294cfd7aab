"""Limits the memory of processes, including their file cache, with a control group."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A control group. A process joins it by writing its pid to `procs`."""

    def __init__(self, path, hits):
        self.procs, self._hits = path / "cgroup.procs", path / hits

    def hits(self):
        """Returns how often the limit was reached."""
        words = self._hits.read_text().split()
        return int(words[words.index("max") + 1] if "max" in words else words[0])


@contextlib.contextmanager
def limited_memory(limit_bytes):
    """Yields a group; skips the test if the user is not allowed to create one."""
    parent, limit, hits = ROOT / "memory", "memory.limit_in_bytes", "memory.failcnt"
    if (ROOT / "cgroup.controllers").exists():  # version 2
        parent, limit, hits = ROOT, "memory.max", "memory.events"
    path = parent / f"pupilseg-{os.getpid()}"
    try:
        path.mkdir()
        (path / limit).write_text(str(limit_bytes))
    except OSError as error:
        if path.exists():
            path.rmdir()
        pytest.skip(f"limiting memory needs permission to create a control group: {error}")
    try:
        yield MemoryGroup(path, hits)
    finally:
        path.rmdir()
