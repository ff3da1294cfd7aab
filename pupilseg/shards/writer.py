"""Writes a split of a source as shards.

The result is deterministic: it depends on neither the number of workers nor interruptions. Shard i
holds the good samples of the source's rows [i * R, (i + 1) * R), so shards are independent and any
process may build any of them. A shard file is complete or absent; a small record with its digest is
kept in `.building/` until the manifest, written last, replaces all records.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pupilseg
from pupilseg.errors import DataError, UsageError
from pupilseg.files import directory_lock, flush_files, json_text, write_text
from pupilseg.preprocess import NONE, remaining_preprocessing
from pupilseg.runtime.progress import progress_bar
from pupilseg.shards.build import Job, too_many_bad, write_record
from pupilseg.shards.format import (
    COLUMNS,
    FORMAT,
    MANIFEST,
    SUMS,
    VERSION,
    shard_name,
    sums_text,
)
from pupilseg.shards.manifest import is_complete, read_manifest
from pupilseg.shards.workers import build_shards

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pupilseg.sample import Dataset

log = logging.getLogger(__name__)

ROWS_PER_SHARD = 64
MAX_FILES = 512
"""Reading keeps every file of a split open; the usual limit per process is 1,024 open files."""
_RECORDS = ".building"


def default_rows_per_shard(count: int) -> int:
    """Returns 64, doubled until a split of `count` samples needs at most 512 files.

    64 rows take 53 MB on disk, and as much memory in each worker that builds them.
    """
    rows = ROWS_PER_SHARD
    while count > rows * MAX_FILES:
        rows *= 2
    return rows


def write_shards(
    dataset: Dataset,
    split: str,
    out_dir: Path,
    *,
    workers: int = 1,
    rows_per_shard: int | None = None,
    preprocessing: str = NONE,
    max_bad: int = 0,
    source_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a split as shards and returns its manifest.

    If `out_dir` already contains this split, nothing is written. If an earlier call was
    interrupted, shards whose digest matches their record are kept.

    Args:
        dataset: must be picklable.
        split: "train" or "validation".
        out_dir: the split's directory; created if missing.
        workers: number of processes; with 1 the calling process does the work.
        rows_per_shard: source samples per shard; None for `default_rows_per_shard`.
        preprocessing: a key of `preprocess.PREPROCESSINGS`. Preprocessing that the source already
            applied is not applied again.
        max_bad: maximum number of samples that may be bad; they are skipped and recorded.
        source_options: options with which the source was read, recorded in the manifest.
        progress: show a progress bar if the output is a terminal.

    Returns:
        The contents of `out_dir / "manifest.json"`.

    Raises:
        DataError: too many bad samples, an empty split, or `out_dir` contains other shards.
        LockedError: another process is writing to `out_dir`.
        OutputError: the disk is full or not writable.
        UsageError: an invalid argument.
    """
    job = make_job(
        dataset,
        split,
        out_dir,
        rows_per_shard=rows_per_shard,
        preprocessing=preprocessing,
        max_bad=max_bad,
        source_options=source_options,
    )
    return write_job(job, workers=workers, progress=progress)


def make_job(
    dataset: Dataset,
    split: str,
    out_dir: Path,
    *,
    rows_per_shard: int | None = None,
    preprocessing: str = NONE,
    max_bad: int = 0,
    source_options: Mapping[str, Any] | None = None,
) -> Job:
    """Returns the settings shared by all shards of a split; arguments as `write_shards`.

    Raises:
        DataError: an empty split.
        UsageError: an invalid argument.
    """
    out_dir = Path(out_dir)
    rows = dataset.count(split)
    if rows < 1:
        raise DataError(f"{dataset.source} has no samples in split {split!r}")
    if max_bad < 0:
        raise UsageError(f"max_bad is {max_bad}, expected at least 0")
    if rows_per_shard is not None and rows_per_shard < 1:
        raise UsageError(f"rows_per_shard is {rows_per_shard}, expected at least 1")
    remaining, resulting = remaining_preprocessing(dataset.preprocessing, preprocessing)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "code_version": pupilseg.__version__,
        "source": dataset.source,
        "source_options": dict(source_options or {}),
        "split": split,
        "split_rule": dataset.split_rule,
        "preprocessing": resulting,
        "source_rows": rows,
        "rows_per_shard": rows_per_shard or default_rows_per_shard(rows),
    }
    return Job(dataset, split, out_dir, out_dir / _RECORDS, remaining, max_bad, header)


def write_job(job: Job, *, workers: int = 1, progress: bool = True) -> dict[str, Any]:
    """Writes all shards of a job created by `make_job`; see `write_shards`."""
    if workers < 1:
        raise UsageError(f"workers is {workers}, expected at least 1")
    with directory_lock(job.out_dir):
        manifest = _reuse_manifest(job)
        if manifest is None:
            manifest = _write_manifest(job, _build_all(job, workers, progress))
        # Done in a complete directory too: an earlier call may have been killed just before this.
        for leftover in job.out_dir.glob(
            ".*.part"
        ):  # left by killed workers, since this process has the lock
            leftover.unlink(missing_ok=True)
        shutil.rmtree(job.records_dir, ignore_errors=True)
    return manifest


def write_part(job: Job, shards: Sequence[int], *, workers: int = 1) -> int:
    """Writes some shards of a split on behalf of another process, possibly on another machine.

    `write_shards` of the same split keeps them, and writes the missing ones and the manifest. Two
    processes must not write the same shard at the same time.

    Args:
        job: created by `make_job`.
        shards: shard numbers below `count_shards(job)`.
        workers: number of processes; with 1 the calling process does the work.

    Returns:
        The number of samples in these shards.

    Raises:
        DataError: one of them has more bad samples than the split may have.
        OutputError: a shard cannot be written.
    """
    return sum(record["rows"] for _, record in build_shards(job, shards, workers))


def count_shards(job: Job) -> int:
    """Returns the number of shard files of a split."""
    return -(-job.header["source_rows"] // job.header["rows_per_shard"])


def _reuse_manifest(job: Job) -> dict[str, Any] | None:
    """Returns the manifest of a directory that already contains this split, or None.

    If shards are missing from the directory, the manifest is turned back into one record per shard,
    so that only the missing shards are built again.

    Raises:
        DataError: the directory contains other shards.
    """
    out_dir, path = job.out_dir, job.out_dir / MANIFEST
    if not path.exists():
        return None
    manifest = read_manifest(out_dir)
    for key, wanted in job.header.items():
        if key != "code_version" and manifest.get(key) != wanted:
            raise DataError(
                f"{out_dir} contains shards with {key} = {manifest.get(key)!r}, not {wanted!r}; "
                f"to replace them, remove {out_dir} and run the same command again, or choose "
                "another directory"
            )
    if is_complete(out_dir):
        return manifest
    header = job.header | {"code_version": manifest.get("code_version")}
    for index, entry in enumerate(manifest["files"]):
        rows = range(index * header["rows_per_shard"], (index + 1) * header["rows_per_shard"])
        skipped = [some for some in manifest["skipped"] if some["index"] in rows]
        write_record(job, index, {**entry, "skipped": skipped, "about": header})
    path.unlink()
    (out_dir / SUMS).unlink(missing_ok=True)
    return None


def _build_all(job: Job, workers: int, progress: bool) -> list[dict[str, Any]]:
    """Builds all shards that are not finished; returns the records of all shards in order."""
    shards = range(count_shards(job))
    expected = {shard_name(i) for i in shards}
    for stale in job.out_dir.glob("shard-*.arrow"):
        if stale.name not in expected:
            stale.unlink()
    records: dict[int, dict[str, Any]] = {}
    bad = 0
    total = job.header["source_rows"]
    with progress_bar(None, job.split, unit="frame", total=total, show=progress) as bar:
        for index, record in build_shards(job, shards, workers):
            records[index] = record
            bar.update(record["rows"] + len(record["skipped"]))
            bad += len(record["skipped"])
            if bad > job.max_bad:
                skipped = [entry for i in sorted(records) for entry in records[i]["skipped"]]
                raise too_many_bad(job.max_bad, skipped)
    return [records[i] for i in shards]


def _write_manifest(job: Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes the list of digests and then the manifest, which it returns."""
    columns = {name: {"dtype": c.dtype, "shape": list(c.shape)} for name, c in COLUMNS.items()}
    keys = ("file", "rows", "bytes", "sha256", "encodings")
    manifest = {
        **job.header,
        "rows": sum(record["rows"] for record in records),
        "columns": columns | {"name": {"dtype": "utf8", "shape": []}},
        "skipped": [entry for record in records for entry in record["skipped"]],
        "files": [{key: record[key] for key in keys} for record in records],
    }
    if not manifest["rows"]:
        raise DataError(f"{job.dataset.source} has no good sample in split {job.split!r}")
    out_dir = job.out_dir
    flush_files(out_dir / record["file"] for record in records)
    text = json_text(manifest)
    write_text(out_dir / SUMS, sums_text(manifest, hashlib.sha256(text.encode()).hexdigest()))
    write_text(out_dir / MANIFEST, text)
    log.info("%s: %d samples in %d files", out_dir, manifest["rows"], len(manifest["files"]))
    return manifest
