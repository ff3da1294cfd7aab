"""A process group whose memory, file cache included, the kernel limits: a small machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A control group; a process joins it by writing its number to `procs`."""

    def __init__(self, path, limit, hits):
        self.procs, self._limit, self._hits = path / "cgroup.procs", path / limit, path / hits

    def set(self, limit_bytes):
        self._limit.write_text(str(limit_bytes))

    def hits(self):
        """How often the limit was met, and memory had to be taken back."""
        words = self._hits.read_text().split()
        return int(words[words.index("max") + 1] if "max" in words else words[0])


@contextlib.contextmanager
def limited_memory(limit_bytes):
    """Yields a group; skips the test where this user may not make one."""
    second = (ROOT / "cgroup.controllers").exists()
    path = (ROOT if second else ROOT / "memory") / f"pupilseg-{os.getpid()}"
    files = (
        ("memory.max", "memory.events")
        if second
        else (
            "memory.limit_in_bytes",
            "memory.failcnt",
        )
    )
    try:
        path.mkdir()
        group = MemoryGroup(path, *files)
        group.set(limit_bytes)
    except OSError as error:
        if path.exists():
            path.rmdir()
        pytest.skip(f"limiting memory needs a control group of one's own: {error}")
    try:
        yield group
    finally:
        path.rmdir()
