"""Describes the machine and the versions of a measurement."""

from __future__ import annotations

import os
import platform
from importlib.metadata import packages_distributions, version
from pathlib import Path


def machine_line(*modules: str) -> str:
    """Returns the processor, its cores, and the versions of Python and of packages.

    Args:
        *modules: import names, such as `cv2`, which opencv-python or opencv-python-headless
            provides. Modules that are not installed are left out.
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    packages = packages_distributions()
    names = [packages[module][0] for module in modules if module in packages]
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"
