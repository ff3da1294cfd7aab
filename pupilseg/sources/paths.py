"""Paths that a data set names: never joined unchecked."""

from __future__ import annotations

from pathlib import PurePosixPath

from pupilseg.errors import DataError


def safe_relative(path: str, where: str) -> PurePosixPath:
    """Returns a path that a data set names, if joining it cannot leave the data set's folder.

    Raises:
        DataError: it is absolute, climbs with `..`, or holds a backslash or control character.
    """
    parts = path.split("/")
    if (
        not path
        or path.startswith("/")
        or any(part in ("", ".", "..") for part in parts)
        or "\\" in path
        or not path.isprintable()
        or ":" in parts[0]
    ):
        raise DataError(f"{where} names the file {path!r}, which is not a path inside it; refused")
    return PurePosixPath(path)
