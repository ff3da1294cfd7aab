"""Python packages: those that an image's commands install, and those that it therefore lacks."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import shlex
from contextlib import suppress
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

if TYPE_CHECKING:
    from collections.abc import Iterable

IN_EVERY_IMAGE = ("modal", "pip", "setuptools", "wheel")


def installed_packages(commands: Iterable[str]) -> set[str]:
    """Returns the normalized names of the packages that an image's commands install with pip."""
    names = set()
    for command in commands:
        # "--python $(command -v python)" and "--constraint FILE" are the options with a value
        options = re.sub(r"--python \$\(.*?\)|--constraint \S+", "", command)
        for word in shlex.split(options.partition("pip install ")[2]):
            if match := re.match(r"[A-Za-z0-9][\w.-]*", word):
                names.add(normal(match.group()))
    return names


@functools.cache
def missing_modules(packages: frozenset[str]) -> list[str]:
    """Returns the modules installed here that an image with these packages does not have."""
    present = set()
    wanted = [*packages, *IN_EVERY_IMAGE]
    while wanted:
        name = wanted.pop()
        if name in present:
            continue
        present.add(name)
        with suppress(importlib.metadata.PackageNotFoundError):
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            wanted += [
                normal(need.name)
                for need in needs
                if need.marker is None or need.marker.evaluate({"extra": ""})
            ]
    return sorted(
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not any(normal(owner) in present for owner in owners)
    )


def normal(name: str) -> str:
    """Returns a distribution's name in its normalized form."""
    return re.sub(r"[-_.]+", "-", name).lower()
