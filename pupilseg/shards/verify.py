"""Reads every byte of a split and says which files are damaged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError
from pupilseg.files import file_digest
from pupilseg.runtime.progress import progress_bar
from pupilseg.shards.codec import FrameDecoder
from pupilseg.shards.format import MANIFEST, SUMS, sums_text
from pupilseg.shards.manifest import read_manifest, rebuild
from pupilseg.shards.mapped import map_file, parse

if TYPE_CHECKING:
    from collections.abc import Iterator

_THREADS = 2
"""Digests and decoding release the GIL; two threads keep up with most disks."""


def verify(directory: str | Path, *, progress: bool = False) -> int:
    """Reads every byte of a split: digests of manifest and shards, then every sample decoded.

    Args:
        directory: holds `manifest.json`, e.g. DIR/train.
        progress: show a bar on a terminal.

    Returns:
        The number of samples.

    Raises:
        DataError: names every damaged file, what is wrong with it, and the mend.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    problems = list(_listing_problems(directory, manifest))
    label = f"checking {directory.name}"
    with (
        progress_bar(None, label, unit="frame", total=manifest["rows"], show=progress) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        checks = {
            pool.submit(_shard_problem, directory, entry): entry for entry in manifest["files"]
        }
        for check in as_completed(checks):
            problem = check.result()
            if problem is not None:
                problems.append(problem)
            bar.update(checks[check]["rows"])
    if problems:
        raise DataError("\n".join(sorted(problems)))
    return int(manifest["rows"])


def _listing_problems(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the list of digests, and shards that nothing lists."""
    sums, mend = directory / SUMS, rebuild(directory / MANIFEST)
    expected = sums_text(manifest, file_digest(directory / MANIFEST))
    try:
        found = sums.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        yield f"{sums} cannot be read ({error}); {mend}"
    else:
        if found != expected:
            yield (
                f"{directory / MANIFEST} and {sums} do not agree, so one of them is damaged; {mend}"
            )
    listed = {entry["file"] for entry in manifest["files"]}
    for path in sorted(directory.glob("shard-*.arrow")):
        if path.name not in listed:
            yield f"{path} is not in {MANIFEST}; remove it"


def _shard_problem(directory: Path, entry: dict[str, Any]) -> str | None:
    """Says what is wrong with a shard; None if nothing is."""
    path = directory / entry["file"]
    try:
        mapping = map_file(directory, entry)
        digest = file_digest(path)
        if digest != entry["sha256"]:
            return f"{path} has SHA-256 {digest}, expected {entry['sha256']}; {rebuild(path)}"
        shard, decoder = parse(path, mapping, entry), FrameDecoder()
        for row in range(entry["rows"]):
            shard.decode(row, decoder)
    except DataError as error:
        return str(error)
    return None
