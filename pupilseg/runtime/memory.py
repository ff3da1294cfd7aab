"""How much memory this process may fill: the machine's, or less in a container."""

from __future__ import annotations

import os
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def host_memory() -> int:
    """Returns the bytes of memory that this process, file cache included, may fill.

    That is the machine's memory, or the least limit of the control groups that the process is in:
    a container's machine has more than the container may use.

    Returns:
        0 where the system does not tell.
    """
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return 0
    return min([machine, *_limits()])


def _limits() -> list[int]:
    """Returns the limits in bytes of this process's control groups, of either version.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html
    """
    try:
        lines = _OWN_GROUPS.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, name = (
            (_GROUPS / "memory", "memory.limit_in_bytes")
            if controllers
            else (_GROUPS, "memory.max")
        )
        # In a container the path may be the host's; its own group is then the mount itself.
        group = Path(path.lstrip("/"))
        for level in (group, *group.parents):
            try:
                text = (mount / level / name).read_text(encoding="ascii").strip()
            except OSError:
                continue
            if text.isdigit():  # otherwise "max"
                found.append(int(text))
    return found
