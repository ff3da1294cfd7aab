"""One shard file as a read-only mapping, and its columns as views of it."""

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
from pupilseg.shards.codec import FrameDecoder, decode_row
from pupilseg.shards.format import METADATA_KEY, NAME, Encodings, all_fields, arrow_schema
from pupilseg.shards.manifest import rebuild

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray


class Shard(NamedTuple):
    """One mapped file.

    Attributes:
        path: of the file.
        encodings: of its columns.
        fields: stored field -> read-only view (rows, width) of the mapping.
        names: of its samples.
        mapping: of the whole file.
        offsets: stored field -> where its first byte is in the mapping.
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

    def decode(self, row: int, decoder: FrameDecoder) -> dict[str, NDArray[Any]]:
        """Returns every column of a row, decoded into new arrays, as `codec.decode_row`.

        Raises:
            DataError: the stored bytes are damaged; names file, row and mend.
        """
        try:
            return decode_row(self.row(row), self.encodings, decoder)
        except DataError as error:
            raise self.damaged(row, error) from error

    def read_ahead(self, row: int, names: Iterable[str]) -> None:
        """Has the kernel start reading fields of a row, and does not wait for it.

        Fields below a page are left out: a call costs more than the one fault it spares.
        """
        for name in names:
            size = self.fields[name].strides[0] if name in self.fields else 0
            if size >= mmap.PAGESIZE:
                start = self.offsets[name] + row * size
                page = start - start % mmap.PAGESIZE
                self.mapping.madvise(mmap.MADV_WILLNEED, page, start + size - page)

    def damaged(self, row: int, error: DataError) -> DataError:
        """Returns the error of a row that cannot be decoded, with file and mend."""
        return DataError(f"{self.path}, row {row}: {error}; {rebuild(self.path)}")


class ColumnView:
    """A column over several shards: an index or a slice within one shard is a view, else a copy."""

    def __init__(self, parts: list[NDArray[Any]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples first, then the shape of a row."""
        return (len(self), *self._parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored values."""
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
    """Maps a file of a manifest, read-only.

    Raises:
        DataError: the file is missing, of another size, unreadable, or one too many to open.
    """
    path = directory / entry["file"]
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == entry["bytes"]:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {rebuild(path)}") from None
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise DataError(
                f"{directory} has more files than this process may open; allow more with "
                "`ulimit -n 8192`, or materialize again with more --rows-per-shard"
            ) from error
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    raise DataError(f"{path} has {size} bytes, expected {entry['bytes']}; {rebuild(path)}")


def parse(path: Path, mapping: mmap.mmap, entry: dict[str, Any]) -> Shard:
    """Finds the columns of a mapped file.

    Raises:
        DataError: it is no Arrow file, or its schema or rows differ from the manifest.
    """
    whole = pa.py_buffer(mapping)
    try:
        reader = pa.ipc.open_file(whole)
        batch: Any = reader.get_batch(0) if reader.num_record_batches == 1 else None
        names = [] if batch is None else batch.column(NAME).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError, UnicodeDecodeError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}; {rebuild(path)}") from error
    encodings: Encodings = entry["encodings"]
    expected = arrow_schema(encodings)
    if batch is None or not batch.schema.equals(expected) or batch.num_rows != entry["rows"]:
        raise DataError(
            f"{path} does not hold the columns and {entry['rows']} rows that its manifest says; "
            f"{rebuild(path)}"
        )
    for found, wanted in zip(batch.schema, expected, strict=True):
        about = [json.loads((f.metadata or {}).get(METADATA_KEY, b"null")) for f in (found, wanted)]
        if about[0] != about[1]:
            raise DataError(
                f"{path} stores {found.name} as {about[0]}, its manifest says {about[1]}; "
                f"{rebuild(path)}"
            )
    fields, offsets = {}, {}
    for field in all_fields(encodings):
        buffer = batch.column(field.name).values.buffers()[1]
        count = entry["rows"] * field.width
        # From the mapping itself, so that a view's only owner is the mapping.
        offset = offsets[field.name] = buffer.address - whole.address if count else 0
        flat = np.frombuffer(mapping, field.dtype, count, offset)
        fields[field.name] = flat.reshape(entry["rows"], field.width)
    return Shard(path, encodings, fields, names, mapping, offsets)
