"""What a process may fill: the machine's memory, or a control group's limit."""

import os

import pytest

from pupilseg.runtime import memory as module
from pupilseg.runtime.memory import host_memory

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
SECOND = "0::/app/job\n"
FIRST = "5:cpu:/\n4:memory:/app/job\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("", {}, MACHINE),
        (SECOND, {"app/job/memory.max": "4096000"}, 4_096_000),
        (SECOND, {"app/job/memory.max": "max"}, MACHINE),
        # A limit of a group above holds too.
        (SECOND, {"app/job/memory.max": "max", "app/memory.max": "8192000"}, 8_192_000),
        (SECOND, {"app/job/memory.max": "9000000", "app/memory.max": "8192000"}, 8_192_000),
        # A container that sees the host's path, and its own group as the mount.
        (SECOND, {"memory.max": "5000000"}, 5_000_000),
        (FIRST, {"memory/app/job/memory.limit_in_bytes": "6000000"}, 6_000_000),
        (FIRST, {"memory/memory.limit_in_bytes": "9223372036854771712"}, MACHINE),
        (FIRST, {"cpu/memory.limit_in_bytes": "1"}, MACHINE),
        ("4:cpu,memory:/a:b\n", {"memory/a:b/memory.limit_in_bytes": "7000000"}, 7_000_000),
    ],
)
def test_the_least_limit_counts(own, files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(module, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(module, "_OWN_GROUPS", tmp_path / "own")
    assert host_memory() == expected


def test_without_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_OWN_GROUPS", tmp_path / "none")
    assert host_memory() == MACHINE


def test_a_system_that_does_not_tell(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert host_memory() == 0
