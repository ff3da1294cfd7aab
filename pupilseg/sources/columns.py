"""Converts parquet columns to NumPy without Python lists, for both revisions of the data set.

Revision A stores nested lists (`list<list<uint8>>`, 400 rows of 640), revision B flat ones
(`list<uint8>`, 256,000 values). In both cases the values are in one flat buffer: after checking the
offsets of each level, the buffer is viewed with the column's shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pupilseg.errors import DataError
from pupilseg.geometry import HEIGHT, NUM_CLASSES, WIDTH

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ArrayColumn:
    """A column with an array of `shape` and `dtype` per row."""

    name: str
    shape: tuple[int, ...]
    dtype: pa.DataType
    required: bool = False

    def __str__(self) -> str:
        size = math.prod(self.shape)
        return f"lists of {self.dtype} nested {list(self.shape)} or flat [{size}]"


ARRAYS = (
    ArrayColumn("image", (HEIGHT, WIDTH), pa.uint8(), required=True),
    ArrayColumn("label", (HEIGHT, WIDTH), pa.uint8(), required=True),
    ArrayColumn("spatial_weights", (HEIGHT, WIDTH), pa.float32()),
    ArrayColumn("dist_map", (NUM_CLASSES, HEIGHT, WIDTH), pa.float32()),
)
ELLIPSE = ("cx", "cy", "rx", "ry")
NAME = "filename"
PREPROCESSED = "preprocessed"


def is_list(kind: pa.DataType) -> bool:
    """Returns True if a type is any kind of list."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def check_schema(schema: pa.Schema, where: str) -> list[str]:
    """Returns the names of the columns to read, after checking the schema.

    Raises:
        DataError: a required column is missing, or one has another type; both are named.
    """
    names = set(schema.names)
    columns: list[str] = []
    for column in ARRAYS:
        if column.name in names:
            list_dims(column, schema.field(column.name).type, where)
            columns.append(column.name)
        elif column.required:
            raise DataError(
                f"{where}: column {column.name} is missing; expected {column}, "
                f"found columns: {', '.join(schema.names)}"
            )
    others = [name for name in ELLIPSE if name in names]
    if others and len(others) < len(ELLIPSE):
        raise DataError(f"{where}: has the columns {others} but not all of {list(ELLIPSE)}")
    for name in others:
        if not pa.types.is_floating(schema.field(name).type):
            raise DataError(
                f"{where}: column {name} is {schema.field(name).type}, expected float32"
            )
    if NAME in names:
        kind = schema.field(NAME).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{where}: column {NAME} is {kind}, expected string")
        others.append(NAME)
    if PREPROCESSED in names and not pa.types.is_boolean(schema.field(PREPROCESSED).type):
        kind = schema.field(PREPROCESSED).type
        raise DataError(f"{where}: column {PREPROCESSED} is {kind}, expected bool")
    return columns + others


def list_dims(column: ArrayColumn, kind: pa.DataType, where: str) -> tuple[int, ...]:
    """Returns the length that each level of lists must have.

    Raises:
        DataError: the type is not a list of the dtype, or has another depth.
    """
    leaf, depth = _storage(kind), 0
    while is_list(leaf):
        leaf, depth = _storage(leaf.field(0).type), depth + 1
    dims = {len(column.shape): column.shape, 1: (math.prod(column.shape),)}.get(depth)
    if dims is None or leaf != column.dtype:
        raise DataError(f"{where}: column {column.name} is {kind}, expected {column}")
    return dims


def _storage(kind: pa.DataType) -> pa.DataType:
    """Returns the storage type of an extension type (`datasets` registers Array2D and Array3D)."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def column_array(column: ArrayColumn, array: Any, file: str, first_row: int) -> NDArray[Any]:
    """Returns a batch of rows as one array, a view of Arrow's buffer.

    Args:
        column: the expected shape and dtype.
        array: the rows, nested or flat.
        file: name of the file, for error messages.
        first_row: row in the file of the first row of the batch, for error messages.

    Returns:
        (rows, *column.shape), read-only.

    Raises:
        DataError: a row is null or has another length; file, row and column are named.
    """
    rows, per_row = len(array), 1
    dims = list_dims(column, array.type, file)
    for dim in dims:
        array = array.storage if isinstance(array, pa.ExtensionArray) else array
        _refuse_nulls(column, array, per_row, file, first_row)
        # A slice keeps its parent's values: `.flatten()` applies the offsets, `.values` does not.
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != dim)
        if len(wrong):
            raise DataError(
                f"{file} row {first_row + int(wrong[0]) // per_row}: column {column.name} has a "
                f"list of {int(lengths[wrong[0]])} values, expected {column}"
            )
        array = array.flatten()
        per_row *= dim
    _refuse_nulls(column, array, per_row, file, first_row)
    values: NDArray[Any] = array.to_numpy(zero_copy_only=True)
    return values.reshape(rows, *column.shape)


def _refuse_nulls(column: ArrayColumn, array: Any, per_row: int, file: str, first_row: int) -> None:
    """Raises DataError at the first null; each row of the file has `per_row` entries."""
    if array.null_count:
        at = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"{file} row {first_row + at // per_row}: column {column.name} holds a null, "
            f"expected {column}"
        )


def ellipse_array(batch: pa.RecordBatch, file: str, first_row: int) -> NDArray[np.float32] | None:
    """Returns float32 (rows, 4) of cx, cy, rx, ry, or None if the columns are missing.

    Raises:
        DataError: a value is null.
    """
    if ELLIPSE[0] not in batch.schema.names:
        return None
    values = []
    for name in ELLIPSE:
        column = batch.column(name)
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(
                f"{file} row {first_row + row}: column {name} is null, expected float32"
            )
        values.append(column.to_numpy(zero_copy_only=False).astype(np.float32))
    return np.stack(values, axis=1)
