"""Checks paths that come from a data set, before they are joined to a folder."""

from __future__ import annotations

from pathlib import PurePosixPath

from pupilseg.errors import DataError


def safe_relative(path: str, where: str) -> PurePosixPath:
    """Returns a path from a data set, if it cannot point outside the data set's folder.

    Args:
        path: relative path with forward slashes.
        where: origin of the path, for the error message.

    Raises:
        DataError: it is absolute, has a `..` or an empty part, a backslash or a control character.
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
        raise DataError(f"{where} lists the file {path!r}, which is not a path inside it; refused")
    return PurePosixPath(path)
