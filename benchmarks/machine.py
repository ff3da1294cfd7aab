"""One line on the machine and versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import packages_distributions, version
from pathlib import Path


def machine_line(*modules: str) -> str:
    """Returns processor, cores, Python and the packages that modules come from, where installed.

    Args:
        *modules: as imported; `cv2` comes from opencv-python or opencv-python-headless.
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
