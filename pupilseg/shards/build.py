"""Builds one shard: read, check, preprocess, encode, write, record. Runs in worker processes."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow as pa

from pupilseg.errors import DataError
from pupilseg.files import atomic_path, file_digest, output_errors, read_json, write_json
from pupilseg.preprocess import get_preprocessing
from pupilseg.sample import check_sample
from pupilseg.shards.columns import ShardColumns
from pupilseg.shards.format import (
    ALIGNMENT,
    NAME,
    Encodings,
    arrow_schema,
    shard_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from numpy.typing import NDArray

    from pupilseg.sample import Dataset, Sample


@dataclass(frozen=True, slots=True)
class Job:
    """What every shard of a split has in common.

    Attributes:
        dataset: where samples come from.
        split: its split.
        out_dir: the split's directory.
        records_dir: where the record of a finished shard lies until the manifest is written.
        preprocessing: what is left to apply to the images.
        max_bad: bad samples that the whole split may have.
        about: the head of the manifest; a finished shard counts only for the same head.
    """

    dataset: Dataset
    split: str
    out_dir: Path
    records_dir: Path
    preprocessing: str
    max_bad: int
    about: dict[str, Any]


def too_many_bad(max_bad: int, skipped: list[dict[str, Any]]) -> str:
    """Returns the message that stops a build: how many bad samples, and the first of them."""
    first = "; ".join(s["error"] for s in skipped[:3])
    more = f" (and {len(skipped) - 3} more)" if len(skipped) > 3 else ""
    return (
        f"{len(skipped)} bad sample(s), allowed {max_bad}: {first}{more}; "
        f"mend the source, or leave them out with --max-bad {len(skipped)}"
    )


_job: Job | None = None


def start_worker(job: Job) -> None:
    """Prepares a worker process: one cv2 thread, no Ctrl-C of its own, ends with its parent."""
    global _job  # noqa: PLW0603 - handed over once a process; with each task it would be pickled
    _job = job
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        # A pool's worker waits for ever when its parent is killed; its sentinel says so.
        def end_with_parent() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()


def build_in_worker(index: int) -> dict[str, Any]:
    """Builds a shard of the worker's job."""
    assert _job is not None
    return build_shard(_job, index)


def build_shard(job: Job, index: int) -> dict[str, Any]:
    """Builds a shard unless it is there; returns its record.

    Returns:
        file, rows, bytes, sha256, encodings, skipped (index in the split, name, error), and
        `about` of the job.

    Raises:
        DataError: this shard alone has more bad samples than the split may have.
        OutputError: the shard cannot be written.
    """
    path = job.out_dir / shard_name(index)
    record = _finished(path, _record_path(job, index), job)
    if record is None:
        columns, skipped = _read_shard(job, index)
        record = {"file": path.name, "rows": len(columns), "skipped": skipped, "about": job.about}
        record |= _write_file(path, columns)
        write_record(job, index, record)
    return record


def write_record(job: Job, index: int, record: dict[str, Any]) -> None:
    """Records a finished shard: file, rows, bytes, sha256, encodings, skipped, about."""
    write_json(_record_path(job, index), record)


def _record_path(job: Job, index: int) -> Path:
    return job.records_dir / f"{Path(shard_name(index)).stem}.json"


def _finished(path: Path, record_path: Path, job: Job) -> dict[str, Any] | None:
    """Returns the record of a shard that an earlier call finished, if the file is still as then."""
    if not (path.is_file() and record_path.is_file()):
        return None
    try:
        record = read_json(record_path, hint="it is made again")
    except DataError:
        return None
    # max_bad is not part of `about`, so the record's own bad samples are counted again.
    if record.get("about") != job.about or record.get("bytes") != path.stat().st_size:
        return None
    return record if record.get("sha256") == file_digest(path) else None


def _read_shard(job: Job, index: int) -> tuple[ShardColumns, list[dict[str, Any]]]:
    """Reads and encodes the samples of a shard; returns them and the bad ones left out."""
    size = job.about["rows_per_shard"]
    start = index * size
    stop = min(start + size, job.about["source_rows"])
    columns = ShardColumns(stop - start)
    preprocess = get_preprocessing(job.preprocessing)
    skipped: list[dict[str, Any]] = []
    for position, outcome in _samples(job, start, stop):
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
                raise DataError(too_many_bad(job.max_bad, skipped)) from error
    return columns, skipped


def _samples(job: Job, start: int, stop: int) -> Iterator[tuple[int, Sample | DataError]]:
    """Yields each position with its sample, or with the DataError that reading it raised."""
    position = start
    while position < stop:
        samples = job.dataset.read(job.split, position, stop)
        try:
            for sample in samples:
                yield position, sample
                position += 1
        except DataError as error:
            # A generator ends with its error, so reading starts anew behind the bad sample.
            yield position, error
            position += 1
        else:
            if position < stop:
                raise DataError(
                    f"{job.dataset.source} ended at sample {position} of split {job.split!r}, "
                    f"expected {job.about['source_rows']}; download it again"
                )


class _Hashing:
    """A binary file that digests what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.closed = file, hashlib.sha256(), False

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()


def _write_file(path: Path, columns: ShardColumns) -> dict[str, Any]:
    """Writes a shard file; returns its size, digest and encodings."""
    encodings = columns.encodings()
    # Not flushed: whoever goes on after a loss of power checks its digest, and the writer flushes
    # all before the manifest. Waiting for the disk here takes 0.4 ms a frame.
    with (
        atomic_path(path, flush=False) as temporary,
        output_errors(path),
        temporary.open("wb") as file,
    ):
        sink = _Hashing(file)
        write_ipc(sink, columns.stored(), columns.names, encodings)
        size = file.tell()
    return {"bytes": size, "sha256": sink.digest.hexdigest(), "encodings": encodings}


def write_ipc(
    sink: Any, stored: dict[str, NDArray[Any]], names: list[str], encodings: Encodings
) -> None:
    """Writes one record batch as an Arrow IPC file with aligned buffers.

    Arrow pads buffers to 8 bytes but writes a buffer that comes padded to 64 as it is, so padding
    each keeps all of them aligned relative to the first; filler in the schema's metadata aligns
    the first.
    """
    schema = arrow_schema(encodings)
    arrays = [_fixed_size_list(stored[field.name], field.type) for field in list(schema)[:-1]]
    arrays.append(pa.array(names, pa.utf8()))
    batch = pa.record_batch(arrays, schema=schema)
    body = sum(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in stored.values())
    schema = arrow_schema(encodings, _padding(batch, encodings, body))
    batch = batch.replace_schema_metadata(schema.metadata)
    options = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V5)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(batch)


def _padding(batch: pa.RecordBatch, encodings: Encodings, fixed_bytes: int) -> int:
    """Returns the filler that brings the first buffer to a multiple of 64 bytes."""
    text = sum(-(-b.size // 8) * 8 for b in batch.column(NAME).buffers() if b is not None)
    head = pa.ipc.get_record_batch_size(batch) - fixed_bytes - text
    magic = 8
    for padding in range(2 * ALIGNMENT):
        if (magic + arrow_schema(encodings, padding).serialize().size + head) % ALIGNMENT == 0:
            return padding
    raise AssertionError("no filler aligns the first buffer")


def _fixed_size_list(array: NDArray[Any], kind: Any) -> Any:
    """Wraps (rows, width) as an Arrow array whose buffer is padded to 64 bytes."""
    rows, width = array.shape
    flat: NDArray[Any] = array.reshape(-1).view(np.uint8)
    if flat.size % ALIGNMENT:
        flat = np.concatenate([flat, np.zeros(-flat.size % ALIGNMENT, dtype=np.uint8)])
    buffer = pa.py_buffer(flat.data)
    values = pa.Array.from_buffers(kind.value_type, rows * width, [None, buffer])
    return pa.Array.from_buffers(kind, rows, [None], children=[values])
