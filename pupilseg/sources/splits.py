"""Names of splits and natural order of names, shared by the sources."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pupilseg.errors import DataError, UsageError
from pupilseg.sample import SPLITS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path, PurePosixPath

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""Spellings of splits in data sets. A test split is never read."""
_FILE = re.compile(rf"({'|'.join(SPLIT_FOLDERS)})(?:[-_.].*)?", re.IGNORECASE)
_DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Returns a sort key that puts "S_2/10" after "S_2/9"."""
    return tuple(
        (0, int(part), part) if part.isdecimal() else (1, 0, part) for part in _DIGITS.split(name)
    )


def split_of(path: PurePosixPath) -> str | None:
    """Returns a file's split by its path, such as `val/x.parquet` or `train-00000.parquet`.

    The outermost folder named after a split takes precedence. None if no part of the path names a
    split.
    """
    for folder in path.parts[:-1]:
        if folder.lower() in SPLIT_FOLDERS:
            return SPLIT_FOLDERS[folder.lower()]
    match = _FILE.fullmatch(path.name)
    return SPLIT_FOLDERS[match[1].lower()] if match else None


def missing_split(where: Path | str, split: str, expected: str, found: Iterable[str]) -> DataError:
    """Returns the error for a source without one of its splits."""
    names = sorted(set(found))
    has = f"found: {', '.join(names)}" if names else "found none"
    test = (
        "; a test split is never used instead: rename it if you want to use it"
        if "test" in names
        else ""
    )
    return DataError(f"{where} has no {split} split; expected {expected}, {has}{test}")


def check_range(split: str, start: int, stop: int, count: int) -> None:
    """Raises IndexError unless 0 <= start <= stop <= count."""
    if not 0 <= start <= stop <= count:
        raise IndexError(f"samples {start}..{stop} of {split}, which has {count}")


def check_split(split: str) -> str:
    """Returns the split's name.

    Raises:
        UsageError: it is neither "train" nor "validation".
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
    return split
