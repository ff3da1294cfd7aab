"""Reads every byte of a split and reports damaged files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError
from pupilseg.files import file_digest
from pupilseg.runtime.progress import progress_bar
from pupilseg.shards.codec import FrameDecoder
from pupilseg.shards.format import MANIFEST, SUMS, sums_text
from pupilseg.shards.manifest import read_manifest, rebuild_hint
from pupilseg.shards.mapped import map_file, parse
from pupilseg.shards.reader import new_row

if TYPE_CHECKING:
    from collections.abc import Iterator

_THREADS = 2
"""Computing digests and decoding release the GIL; two threads keep up with most disks."""


def verify(directory: str | Path, *, progress: bool = False) -> int:
    """Reads every byte of a split: checks the digests of all files and decodes all samples.

    Args:
        directory: contains `manifest.json`, e.g. DIR/train.
        progress: show a progress bar if the output is a terminal.

    Returns:
        The number of samples.

    Raises:
        DataError: one line per damaged file, with the problem and a fix.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    problems = list(_find_listing_problems(directory, manifest))
    label = f"checking {directory.name}"
    with (
        progress_bar(None, label, unit="frame", total=manifest["rows"], show=progress) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        checks = {
            pool.submit(_find_shard_problem, directory, entry): entry for entry in manifest["files"]
        }
        for check in as_completed(checks):
            if problem := check.result():
                problems.append(problem)
            bar.update(checks[check]["rows"])
    if problems:
        raise DataError("\n".join(sorted(problems)))
    return int(manifest["rows"])


def _find_listing_problems(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yields problems of the list of digests, and shards that the manifest does not list."""
    sums = directory / SUMS
    hint = rebuild_hint(directory / MANIFEST)
    expected = sums_text(manifest, file_digest(directory / MANIFEST))
    try:
        found = sums.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        yield f"{sums} cannot be read ({error}); {hint}"
    else:
        if found != expected:
            yield f"{directory / MANIFEST} and {sums} disagree, so one is damaged; {hint}"
    listed = {entry["file"] for entry in manifest["files"]}
    for path in sorted(directory.glob("shard-*.arrow")):
        if path.name not in listed:
            yield f"{path} is not in {MANIFEST}; remove it"


def _find_shard_problem(directory: Path, entry: dict[str, Any]) -> str:
    """Returns a description of the first problem of a shard, or an empty string."""
    path = directory / entry["file"]
    try:
        mapping = map_file(directory, entry)
        digest = file_digest(path)
        if digest != entry["sha256"]:
            return f"{path} has SHA-256 {digest}, expected {entry['sha256']}; {rebuild_hint(path)}"
        shard, decoder, decoded = parse(path, mapping, entry), FrameDecoder(), new_row()
        for row in range(entry["rows"]):
            shard.decode(row, decoded, decoder)
    except DataError as error:
        return str(error)
    return ""
