"""Memory that is freed and taken again costs no page faults."""

import platform
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

PROGRAM = """
import resource, sys
import torch
from pupilseg.runtime.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    torch.zeros(12 << 20)  # 48 MB, beyond the 32 MB that glibc keeps by itself
for _ in range(20):  # until the heap has found its size
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


def faults(mode):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_kept_memory_is_not_faulted_in_again():
    assert faults("default") > 1000  # else there is nothing to gain here
    assert faults("keep") < 100
