"""Turns a split of a source into shards: same input, same bytes, whatever the workers and kills.

Shard i holds the good samples of the source's rows [i * R, (i + 1) * R), so shards are independent
and any process may write any of them. Each is complete or absent; beside it a small record with
its digest lies in `.building/` until the manifest, written last, takes over.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pupilseg
from pupilseg.errors import DataError, UsageError
from pupilseg.files import directory_lock, flush_files, json_text, write_text
from pupilseg.preprocess import NONE, remaining_preprocessing
from pupilseg.runtime.progress import progress_bar
from pupilseg.shards import build
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
from pupilseg.shards.schedule import Runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pupilseg.sample import Dataset

log = logging.getLogger(__name__)

ROWS_PER_SHARD = 64
MOST_FILES = 512
"""Reading keeps a descriptor open for each file of a split; a process usually may have 1,024."""
_BUILDING = ".building"


def default_rows_per_shard(count: int) -> int:
    """Returns the rows of a shard: 64, doubled until a split of `count` takes at most 512 files.

    64 rows take 53 MB on disk, and as much memory in each worker that builds them.
    """
    rows = ROWS_PER_SHARD
    while count > rows * MOST_FILES:
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

    Where `out_dir` already holds this split, complete, nothing is written. Where an earlier call
    was cut off, shards whose digest is as recorded are kept.

    Args:
        dataset: picklable; reads by range.
        split: "train" or "validation".
        out_dir: becomes the split's directory; made if missing.
        workers: processes; 1 works in this process.
        rows_per_shard: samples of the source a shard; None for `default_rows_per_shard`.
        preprocessing: a name of `preprocess.PREPROCESSINGS`; what the source already applied is
            not applied again.
        max_bad: samples that may raise DataError and are left out, counted and named.
        source_options: how the source was read, recorded with it.
        progress: show a bar on a terminal.

    Returns:
        The manifest, as in `out_dir / "manifest.json"`.

    Raises:
        DataError: a bad sample too many, an empty split, or `out_dir` holds something else.
        LockedError: another process is writing there.
        OutputError: the disk is full or may not be written.
        UsageError: an argument that makes no sense.
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


def write_job(job: build.Job, *, workers: int = 1, progress: bool = True) -> dict[str, Any]:
    """Writes the shards of a job from `make_job`; see `write_shards`."""
    if workers < 1:
        raise UsageError(f"workers = {workers}, expected at least 1")
    with directory_lock(job.out_dir):
        manifest = _existing(job) or _write_all(job, workers, progress)
        # Last, and of a complete directory too: an earlier call may have been killed just here.
        for leftover in job.out_dir.glob(".*.part"):  # of killed workers; the lock is ours
            leftover.unlink(missing_ok=True)
        shutil.rmtree(job.records_dir, ignore_errors=True)
    return manifest


def make_job(
    dataset: Dataset,
    split: str,
    out_dir: Path,
    *,
    rows_per_shard: int | None = None,
    preprocessing: str = NONE,
    max_bad: int = 0,
    source_options: Mapping[str, Any] | None = None,
) -> build.Job:
    """Returns what every shard of a split has in common; the arguments are those of `write_shards`.

    Raises:
        DataError: an empty split.
        UsageError: an argument that makes no sense.
    """
    out_dir = Path(out_dir)
    rows = dataset.count(split)
    if rows < 1:
        raise DataError(f"{dataset.source} has no samples in split {split!r}")
    if max_bad < 0 or (rows_per_shard is not None and rows_per_shard < 1):
        raise UsageError(
            f"rows_per_shard = {rows_per_shard}, max_bad = {max_bad}: expected at least 1 and 0"
        )
    apply, effective = remaining_preprocessing(dataset.preprocessing, preprocessing)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "code_version": pupilseg.__version__,
        "source": dataset.source,
        "source_options": dict(source_options or {}),
        "split": split,
        "split_rule": dataset.split_rule,
        "preprocessing": effective,
        "source_rows": rows,
        "rows_per_shard": rows_per_shard or default_rows_per_shard(rows),
    }
    return build.Job(dataset, split, out_dir, out_dir / _BUILDING, apply, max_bad, about)


def count_shards(job: build.Job) -> int:
    """Returns the number of shard files of a split."""
    return -(-job.about["source_rows"] // job.about["rows_per_shard"])


def write_part(job: build.Job, shards: Sequence[int], *, workers: int = 1) -> int:
    """Writes some shards of a split, for another process, which may be on another machine.

    `write_shards` of the same split finds them finished, and writes what is missing and the
    manifest. Two processes must not be given the same shard at once.

    Args:
        job: from `make_job`.
        shards: numbers below `count_shards(job)`.
        workers: processes; 1 works in this process.

    Returns:
        The number of samples in them.

    Raises:
        DataError: more bad samples in one of them than the split may have.
        OutputError: a shard cannot be written.
    """
    return sum(record["rows"] for _, record in _results(job, list(shards), workers))


def _existing(job: build.Job) -> dict[str, Any] | None:
    """Returns the manifest of a complete directory with just this content; None if not complete.

    Of an incomplete one (a shard was removed) the manifest becomes records again, so that what is
    left is kept and only what is missing is built.

    Raises:
        DataError: the directory holds shards of something else.
    """
    out_dir, path = job.out_dir, job.out_dir / MANIFEST
    if not path.exists():
        return None
    manifest = read_manifest(out_dir)
    for key, wanted in job.about.items():
        if key != "code_version" and manifest.get(key) != wanted:
            raise DataError(
                f"{out_dir} holds shards with {key} = {manifest.get(key)!r}, asked for {wanted!r}; "
                f"to replace them remove {out_dir} and run the same command again, or choose "
                "another directory"
            )
    if is_complete(out_dir):
        return manifest
    about = job.about | {"code_version": manifest.get("code_version")}
    for index, entry in enumerate(manifest["files"]):
        rows = range(index * about["rows_per_shard"], (index + 1) * about["rows_per_shard"])
        skipped = [some for some in manifest["skipped"] if some["index"] in rows]
        build.write_record(job, index, {**entry, "skipped": skipped, "about": about})
    path.unlink()
    (out_dir / SUMS).unlink(missing_ok=True)
    return None


def _write_all(job: build.Job, workers: int, progress: bool) -> dict[str, Any]:
    """Builds what is missing, then writes the list of digests and, last, the manifest."""
    records, out_dir = _build_all(job, workers, progress), job.out_dir
    manifest = _manifest(job.about, records)
    if not manifest["rows"]:
        raise DataError(f"{job.dataset.source} has no good sample in split {job.split!r}")
    flush_files(out_dir / record["file"] for record in records)
    text = json_text(manifest)
    write_text(out_dir / SUMS, sums_text(manifest, hashlib.sha256(text.encode()).hexdigest()))
    write_text(out_dir / MANIFEST, text)
    log.info("%s: %d samples in %d files", out_dir, manifest["rows"], len(manifest["files"]))
    return manifest


def _build_all(job: build.Job, workers: int, progress: bool) -> list[dict[str, Any]]:
    """Builds every shard that is not there yet; returns the records in order."""
    shards = range(count_shards(job))
    expected = {shard_name(i) for i in shards}
    for stale in job.out_dir.glob("shard-*.arrow"):
        if stale.name not in expected:
            stale.unlink()
    records: dict[int, dict[str, Any]] = {}
    bar = progress_bar(None, job.split, unit="frame", total=job.about["source_rows"], show=progress)
    bad = 0
    with bar:
        for index, record in _results(job, list(shards), workers):
            records[index] = record
            bar.update(record["rows"] + len(record["skipped"]))
            bad += len(record["skipped"])
            if bad > job.max_bad:
                every = [s for i in sorted(records) for s in records[i]["skipped"]]
                raise DataError(build.too_many_bad(job.max_bad, every))
    return [records[i] for i in shards]


def _results(
    job: build.Job, shards: list[int], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (shard, its record) as shards are finished."""
    workers = min(workers, len(shards))
    if workers == 1:
        for index in shards:
            yield index, build.build_shard(job, index)
        return
    # spawn: a forked child would inherit locks held by threads of cv2, torch or pyarrow. A pool a
    # worker: one pool cannot say which of its processes takes a task.
    spawn, runs = get_context("spawn"), Runs(shards, workers)
    pools = [
        ProcessPoolExecutor(1, spawn, initializer=build.start_worker, initargs=(job,))
        for _ in range(workers)
    ]
    under_way: dict[Future[dict[str, Any]], tuple[int, int]] = {}

    def give(worker: int) -> None:
        index = runs.next(worker)
        if index is not None:
            under_way[pools[worker].submit(build.build_in_worker, index)] = worker, index

    try:
        for worker in range(workers):
            give(worker)
        while under_way:
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                worker, index = under_way.pop(future)
                give(worker)
                yield index, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended abruptly, usually for want of memory; what is finished is "
            "kept: run the same command again, with fewer --workers or --rows-per-shard"
        ) from error
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


def _manifest(about: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the manifest: what was asked for, columns, skipped samples and files."""
    columns = {name: {"dtype": c.dtype, "shape": list(c.shape)} for name, c in COLUMNS.items()}
    keys = ("file", "rows", "bytes", "sha256", "encodings")
    return {
        **about,
        "rows": sum(record["rows"] for record in records),
        "columns": columns | {"name": {"dtype": "utf8", "shape": []}},
        "skipped": [skipped for record in records for skipped in record["skipped"]],
        "files": [{key: record[key] for key in keys} for record in records],
    }
