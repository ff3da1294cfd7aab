"""A shard file as a read-only mapping, and its columns as views of it."""

from __future__ import annotations

import errno
import json
import mmap
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from pupilseg.errors import DataError
from pupilseg.shards.arrow_file import METADATA_KEY, arrow_schema
from pupilseg.shards.codec import all_fields
from pupilseg.shards.format import NAME, Encodings
from pupilseg.shards.manifest import rebuild_hint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pupilseg.shards.codec import FrameDecoder


class Shard(NamedTuple):
    """One mapped file.

    Attributes:
        path: the file.
        encodings: column -> encoding and its parameters.
        fields: stored field -> read-only view (rows, width) of the mapping.
        names: one per row.
        mapping: the whole file.
        offsets: stored field -> offset of its first byte in the mapping.
    """

    path: Path
    encodings: Encodings
    fields: dict[str, NDArray[Any]]
    names: list[str]
    mapping: mmap.mmap
    offsets: dict[str, int]

    def row(self, row: int) -> dict[str, NDArray[Any]]:
        """Returns views of one row's stored fields."""
        return {name: field[row] for name, field in self.fields.items()}

    def decode(self, row: int, out: Mapping[str, NDArray[Any]], decoder: FrameDecoder) -> None:
        """Writes columns of a row, without their names.

        Args:
            row: number of the row in this shard.
            out: column -> array to write, as in `FrameDecoder.decode`.
            decoder: provides scratch memory.

        Raises:
            DataError: the stored bytes are damaged; the message names the file, the row and a fix.
        """
        stored = self.row(row)
        try:
            for column, target in out.items():
                decoder.decode(column, stored, self.encodings[column], target)
        except DataError as error:
            raise DataError(
                f"{self.path}, row {row}: {error}; {rebuild_hint(self.path)}"
            ) from error

    def read_ahead(self, row: int, names: Iterable[str]) -> None:
        """Asks the kernel to read fields of a row, without waiting for them.

        Skips fields smaller than a page, for which the call takes longer than a page fault.
        """
        for name in names:
            size = self.fields[name].strides[0] if name in self.fields else 0
            if size >= mmap.PAGESIZE:
                start = self.offsets[name] + row * size
                page = start - start % mmap.PAGESIZE
                self.mapping.madvise(mmap.MADV_WILLNEED, page, start + size - page)


class ColumnView:
    """A column of several shards.

    Indexing with an integer, or with a slice within one shard, returns a view. Any other selection
    returns a copy.
    """

    def __init__(self, parts: list[NDArray[Any]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of samples, then the shape of a row."""
        return (len(self), *self._parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored values."""
        return self._parts[0].dtype

    def __getitem__(self, key: int | slice | NDArray[np.integer]) -> NDArray[Any]:
        if isinstance(key, int | np.integer):
            index = range(len(self))[int(key)]
            part = bisect_right(self._ends, index)
            return self._parts[part][index - self._ends[part]]
        indices = range(len(self))[key] if isinstance(key, slice) else key
        if isinstance(indices, range) and indices.step == 1 and len(indices):
            part = bisect_right(self._ends, indices[0])
            if indices[-1] < self._ends[part]:
                shift = self._ends[part] - len(self._parts[part])
                return self._parts[part][indices.start - shift : indices.stop - shift]
        out = np.empty((len(indices), *self.shape[1:]), dtype=self.dtype)
        for row, index in enumerate(indices):
            out[row] = self[int(index)]
        return out

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (row for part in self._parts for row in part)


def map_file(directory: Path, entry: dict[str, Any]) -> mmap.mmap:
    """Maps a file that a manifest lists, read-only.

    Raises:
        DataError: the file is missing, has another size, cannot be read, or exceeds the limit of
            open files.
    """
    path = directory / entry["file"]
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == entry["bytes"]:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {rebuild_hint(path)}") from None
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise DataError(
                f"{directory} has more files than this process may open; raise the limit with "
                "`ulimit -n 8192`, or materialize again with more --rows-per-shard"
            ) from error
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    raise DataError(f"{path} has {size} bytes, expected {entry['bytes']}; {rebuild_hint(path)}")


def parse(path: Path, mapping: mmap.mmap, entry: dict[str, Any]) -> Shard:
    """Finds the columns in a mapped file.

    Raises:
        DataError: it is not an Arrow file, or its schema or rows differ from the manifest.
    """
    whole = pa.py_buffer(mapping)
    try:
        reader = pa.ipc.open_file(whole)
        batch: Any = reader.get_batch(0) if reader.num_record_batches == 1 else None
        names = [] if batch is None else batch.column(NAME).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError, UnicodeDecodeError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}; {rebuild_hint(path)}") from error
    encodings: Encodings = entry["encodings"]
    expected = arrow_schema(encodings)
    if batch is None or not batch.schema.equals(expected) or batch.num_rows != entry["rows"]:
        raise DataError(
            f"{path} does not have the columns and {entry['rows']} rows listed in its manifest; "
            f"{rebuild_hint(path)}"
        )
    for field, wanted in zip(batch.schema, expected, strict=True):
        found_json, wanted_json = (
            json.loads((f.metadata or {}).get(METADATA_KEY, b"null")) for f in (field, wanted)
        )
        if found_json != wanted_json:
            raise DataError(
                f"{path} stores {field.name} as {found_json}, but its manifest has {wanted_json}; "
                f"{rebuild_hint(path)}"
            )
    fields, offsets = {}, {}
    for stored in all_fields(encodings):
        buffer = batch.column(stored.name).values.buffers()[1]
        count = entry["rows"] * stored.width
        offset = offsets[stored.name] = buffer.address - whole.address if count else 0
        # Views of the mapping itself, so that nothing else keeps it open.
        flat = np.frombuffer(mapping, stored.dtype, count, offset)
        fields[stored.name] = flat.reshape(entry["rows"], stored.width)
    return Shard(path, encodings, fields, names, mapping, offsets)
