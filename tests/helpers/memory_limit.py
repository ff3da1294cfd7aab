"""A process group whose memory, file cache included, the kernel limits: a small machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A control group; a process joins it by writing its number to `procs`."""

    def __init__(self, path, hits):
        self.procs, self._hits = path / "cgroup.procs", path / hits

    def hits(self):
        """How often the limit was met, and memory had to be taken back."""
        words = self._hits.read_text().split()
        return int(words[words.index("max") + 1] if "max" in words else words[0])


@contextlib.contextmanager
def limited_memory(limit_bytes):
    """Yields a group; skips the test where this user may not make one."""
    parent, limit, hits = ROOT / "memory", "memory.limit_in_bytes", "memory.failcnt"
    if (ROOT / "cgroup.controllers").exists():  # the second version
        parent, limit, hits = ROOT, "memory.max", "memory.events"
    path = parent / f"pupilseg-{os.getpid()}"
    try:
        path.mkdir()
        (path / limit).write_text(str(limit_bytes))
    except OSError as error:
        if path.exists():
            path.rmdir()
        pytest.skip(f"limiting memory needs a control group of one's own: {error}")
    try:
        yield MemoryGroup(path, hits)
    finally:
        path.rmdir()
