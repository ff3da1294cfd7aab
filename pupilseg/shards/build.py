"""Builds one shard: reads, checks, preprocesses, encodes and writes its samples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pupilseg.errors import DataError
from pupilseg.files import atomic_path, file_digest, output_errors, read_json, write_json
from pupilseg.preprocess import get_preprocessing
from pupilseg.sample import check_sample
from pupilseg.shards.arrow_file import write_ipc
from pupilseg.shards.columns import ShardColumns
from pupilseg.shards.format import shard_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from pupilseg.sample import Dataset, Sample


@dataclass(frozen=True, slots=True)
class Job:
    """Settings shared by all shards of a split.

    Attributes:
        dataset: source of the samples.
        split: "train" or "validation".
        out_dir: the split's directory.
        records_dir: holds the record of each finished shard until the manifest is written.
        preprocessing: preprocessing to apply to the images, apart from the source's own.
        max_bad: maximum number of bad samples in the split.
        header: first part of the manifest. A finished shard is kept only if its header is equal.
    """

    dataset: Dataset
    split: str
    out_dir: Path
    records_dir: Path
    preprocessing: str
    max_bad: int
    header: dict[str, Any]


def too_many_bad(max_bad: int, skipped: list[dict[str, Any]]) -> DataError:
    """Returns the error that stops a build, with the number of bad samples and the first three."""
    first = "; ".join(entry["error"] for entry in skipped[:3])
    more = f" (and {len(skipped) - 3} more)" if len(skipped) > 3 else ""
    return DataError(
        f"{len(skipped)} bad sample(s), allowed {max_bad}: {first}{more}; "
        f"fix the source, or skip them with --max-bad {len(skipped)}"
    )


def build_shard(job: Job, index: int) -> dict[str, Any]:
    """Builds a shard, unless an earlier call finished it, and returns its record.

    Returns:
        file, rows, bytes, sha256, encodings, skipped (index in the split, name, error), and the
        job's header as "about".

    Raises:
        DataError: this shard alone has more bad samples than the split may have.
        OutputError: the shard cannot be written.
    """
    path = job.out_dir / shard_name(index)
    record = _finished_record(job, index, path)
    if record is None:
        columns, skipped = _encode_samples(job, index)
        record = {"file": path.name, "rows": len(columns), "skipped": skipped, "about": job.header}
        record |= _write_file(path, columns)
        write_record(job, index, record)
    return record


def write_record(job: Job, index: int, record: dict[str, Any]) -> None:
    """Records a finished shard; see `build_shard` for the keys."""
    write_json(_record_path(job, index), record)


def _record_path(job: Job, index: int) -> Path:
    return job.records_dir / f"{Path(shard_name(index)).stem}.json"


def _finished_record(job: Job, index: int, path: Path) -> dict[str, Any] | None:
    """Returns the record of a shard that an earlier call finished, if its file is unchanged."""
    record_path = _record_path(job, index)
    if not (path.is_file() and record_path.is_file()):
        return None
    try:
        record = read_json(record_path, hint="the shard is rebuilt")
    except DataError:
        return None
    # max_bad is not part of the header, so the record's own bad samples are counted again.
    if record.get("about") != job.header or record.get("bytes") != path.stat().st_size:
        return None
    return record if record.get("sha256") == file_digest(path) else None


def _encode_samples(job: Job, index: int) -> tuple[ShardColumns, list[dict[str, Any]]]:
    """Returns the encoded good samples of a shard, and entries for the bad ones."""
    size = job.header["rows_per_shard"]
    start = index * size
    stop = min(start + size, job.header["source_rows"])
    columns = ShardColumns(stop - start)
    preprocess = get_preprocessing(job.preprocessing)
    skipped: list[dict[str, Any]] = []
    for position, outcome in _read_samples(job, start, stop):
        name = None
        try:
            if isinstance(outcome, DataError):
                raise outcome
            name = outcome.name
            check_sample(outcome)
            columns.append(outcome, preprocess(outcome.image))
        except DataError as error:
            where = f"{job.split}[{position}]" + (f" {name!r}" if name is not None else "")
            skipped.append({"index": position, "name": name, "error": f"{where}: {error}"})
            if len(skipped) > job.max_bad:
                raise too_many_bad(job.max_bad, skipped) from error
    return columns, skipped


def _read_samples(job: Job, start: int, stop: int) -> Iterator[tuple[int, Sample | DataError]]:
    """Yields each position with its sample, or with the DataError raised while reading it."""
    position = start
    while position < stop:
        samples = job.dataset.read(job.split, position, stop)
        try:
            for sample in samples:
                yield position, sample
                position += 1
        except DataError as error:
            # A generator ends when it raises, so reading restarts after the bad sample.
            yield position, error
            position += 1
        else:
            if position < stop:
                raise DataError(
                    f"{job.dataset.source} ended at sample {position} of split {job.split!r}, "
                    f"expected {job.header['source_rows']}; download it again"
                )


def _write_file(path: Path, columns: ShardColumns) -> dict[str, Any]:
    """Writes a shard file; returns its size, digest and encodings."""
    encodings = columns.encodings()
    # Not flushed to disk here, which would take 0.4 ms per frame: the writer flushes all shards
    # before it writes the manifest, and a rerun after a power failure compares digests.
    with (
        atomic_path(path, flush=False) as temporary,
        output_errors(path),
        temporary.open("wb") as file,
    ):
        sink = _HashingFile(file)
        write_ipc(sink, columns.stored(), columns.names, encodings)
        size = file.tell()
    return {"bytes": size, "sha256": sink.sha256.hexdigest(), "encodings": encodings}


class _HashingFile:
    """A binary file that computes the SHA-256 of everything written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.closed = False

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()
