"""The host: the memory and CPU cores that this process may use, and its allocator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_M_TRIM_THRESHOLD = -1  # parameter numbers of glibc's `malloc.h`
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_INT_MAX = 2**31 - 1
_TOP_PAD_BYTES = 64 << 20


def host_memory() -> int:
    """Returns the bytes of memory that this process may use, including its page cache.

    This is the machine's memory or the lowest limit of the process's control groups, because a
    container usually may not use all memory of its machine.

    Returns:
        0 where the operating system does not report its memory.
    """
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return 0
    limits = _cgroup_values("memory", "memory.max", "memory.limit_in_bytes")
    return min([machine, *(int(text) for text in limits if text.isdigit())])  # "max": no limit


def available_cores() -> int:
    """Returns the number of CPU cores that this process may use, at least 1.

    These are the cores of its affinity mask, or fewer if a control group (version 2) limits its CPU
    time.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = [len(affinity(0)) if affinity else os.cpu_count() or 1]
    for text in _cgroup_values("cpu", "cpu.max", None):
        quota, _, period = text.partition(" ")
        if quota.isdigit():  # "max": no limit
            cores.append(int(quota) // int(period))
    return max(1, min(cores))


def _cgroup_values(controller: str, file: str, file_v1: str | None) -> list[str]:
    """Returns the texts of a file in each of this process's control groups, version 1 or 2.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html
    """
    try:
        lines = _OWN_CGROUPS.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    texts = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            mount, name = _CGROUPS, file
        elif file_v1 is not None and controller in controllers.split(","):
            mount, name = _CGROUPS / controller, file_v1
        else:
            continue
        # In a container, the path may be the host's while the mount is the container's own group.
        group = Path(path.lstrip("/"))
        for level in (group, *group.parents):
            with contextlib.suppress(OSError):
                texts.append((mount / level / name).read_text(encoding="ascii").strip())
    return texts


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory in this process instead of returning it to the kernel.

    A training step frees and allocates several hundred MB. Each page that is returned to the kernel
    causes a page fault and is zeroed again in the next step. Keeping the memory shortens an epoch
    on two cores from 2.8 s to 2.3 s (docs/benchmarks.md), but the process never shrinks again.

    Returns:
        Whether the setting took effect; False on C libraries other than glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {
        _M_MMAP_MAX: 0,
        _M_TRIM_THRESHOLD: _INT_MAX,
        _M_TOP_PAD: _TOP_PAD_BYTES,
    }
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())
