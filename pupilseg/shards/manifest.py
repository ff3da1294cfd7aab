"""Reads and checks the manifest of a split."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError
from pupilseg.files import read_json
from pupilseg.shards.codec import all_fields
from pupilseg.shards.format import FORMAT, MANIFEST, VERSION

if TYPE_CHECKING:
    from pathlib import Path

MATERIALIZE = "python -m pipeline.materialize --raw RAW --out DIR"
_FILE_NAME = re.compile(r"shard-\d{5,}\.arrow")


def rebuild_hint(path: Path) -> str:
    """Returns the hint for a bad file: a shard is rebuilt alone, a manifest with its split."""
    bad = path if path.suffix == ".arrow" else path.parent
    return f"remove {bad} and rebuild it with: {MATERIALIZE}"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns the checked manifest of a split.

    Raises:
        DataError: the manifest is missing or damaged, or has another format or version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / "train" / MANIFEST).is_file():
            raise DataError(
                f"{directory} contains splits, not shards; "
                f"open {directory / 'train'} or {directory / 'validation'}"
            )
        unfinished = any(directory.glob("shard-*.arrow")) if directory.is_dir() else False
        problem = "is unfinished: it has no" if unfinished else "has no"
        raise DataError(f"{directory} {problem} {MANIFEST}; create it with: {MATERIALIZE}")
    manifest = read_json(path, hint=rebuild_hint(path))
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{path} is not a shard manifest: format is {manifest.get('format')!r}, "
            f"expected {FORMAT!r}; create shards with: {MATERIALIZE}"
        )
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{path} has format version {manifest.get('version')!r}, this program reads {VERSION}; "
            f"{rebuild_hint(path)}"
        )
    try:
        problem = _find_problem(manifest)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise DataError(f"{path} is damaged ({problem}); {rebuild_hint(path)}")
    return manifest


def _find_problem(manifest: dict[str, Any]) -> str:
    """Returns a description of the first problem, or an empty string."""
    for entry in manifest["files"]:
        all_fields(entry["encodings"])
        # The manifest is untrusted: a file name must not point outside the directory.
        if not _FILE_NAME.fullmatch(entry["file"]):
            return f"a file named {entry['file']!r}, expected shard-00000.arrow"
        if not (_is_count(entry["rows"]) and _is_count(entry["bytes"])):
            return f"{entry['file']} with {entry['rows']!r} rows and {entry['bytes']!r} bytes"
        if not isinstance(entry["sha256"], str):
            return f"{entry['file']} without a digest"
    rows = sum(entry["rows"] for entry in manifest["files"])
    if rows != manifest["rows"] or rows < 1:
        return f"rows is {manifest['rows']!r}, its files have {rows}"
    return ""


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_complete(directory: Path) -> bool:
    """Returns True if a split has its manifest and all listed files with their recorded sizes.

    Raises:
        DataError: the manifest is damaged, or has another format or version.
    """
    if not (directory / MANIFEST).is_file():
        return False
    files = [(directory / f["file"], f["bytes"]) for f in read_manifest(directory)["files"]]
    return all(file.is_file() and file.stat().st_size == size for file, size in files)
