"""Host memory: the limit that applies to a process, and an allocator that keeps freed blocks."""

import os
import platform
import subprocess
import sys

import pytest

from pupilseg.runtime import host
from pupilseg.runtime.host import available_cores, host_memory
from tests.helpers.paths import ROOT

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
VERSION_2 = "0::/app/job\n"
VERSION_1 = "5:cpu:/\n4:memory:/app/job\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("", {}, MACHINE),
        (VERSION_2, {"app/job/memory.max": "4096000"}, 4_096_000),
        (VERSION_2, {"app/job/memory.max": "max"}, MACHINE),
        # The limit of a parent group applies too.
        (VERSION_2, {"app/job/memory.max": "max", "app/memory.max": "8192000"}, 8_192_000),
        (VERSION_2, {"app/job/memory.max": "9000000", "app/memory.max": "8192000"}, 8_192_000),
        # A container that sees the host's path while the mount is its own group.
        (VERSION_2, {"memory.max": "5000000"}, 5_000_000),
        (VERSION_1, {"memory/app/job/memory.limit_in_bytes": "6000000"}, 6_000_000),
        (VERSION_1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, MACHINE),
        (VERSION_1, {"cpu/memory.limit_in_bytes": "1"}, MACHINE),
        ("4:cpu,memory:/a:b\n", {"memory/a:b/memory.limit_in_bytes": "7000000"}, 7_000_000),
    ],
)
def test_the_lowest_limit_applies(own, files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(host, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(host, "_OWN_CGROUPS", tmp_path / "own")
    assert host_memory() == expected


def test_without_control_groups_it_is_the_machines_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_OWN_CGROUPS", tmp_path / "none")
    assert host_memory() == MACHINE


def test_a_system_that_does_not_report_its_memory_gives_zero(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert host_memory() == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"app/job/cpu.max": "max 100000"}, 8),
        ({"app/job/cpu.max": "300000 100000"}, 3),
        ({"app/job/cpu.max": "max 100000", "app/cpu.max": "200000 100000"}, 2),
        ({"app/job/cpu.max": "50000 100000"}, 1),
        ({"app/job/cpu.max": "1600000 100000"}, 8),
    ],
)
def test_cores_are_those_of_the_affinity_mask_and_the_quota(files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (tmp_path / "own").write_text(VERSION_2)
    monkeypatch.setattr(host, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(host, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    assert available_cores() == expected


PROGRAM = """
import resource, sys
import torch
from pupilseg.runtime.host import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    torch.zeros(12 << 20)  # 48 MB, more than the 32 MB that glibc keeps by default
for _ in range(20):  # until the heap has reached its size
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


def page_faults(mode):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_kept_memory_causes_no_page_faults():
    assert page_faults("default") > 1000  # otherwise there is nothing to gain here
    assert page_faults("keep") < 100
