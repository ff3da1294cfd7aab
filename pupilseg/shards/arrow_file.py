"""Arrow IPC files with aligned buffers: schema and writing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pupilseg.shards.codec import stored_fields
from pupilseg.shards.format import COLUMNS, FORMAT, NAME, VERSION, Encodings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

ALIGNMENT = 64
"""Buffers start at multiples of this many bytes, as the Arrow format recommends (a cache line)."""
METADATA_KEY = b"pupilseg"
_MAGIC_BYTES = len(b"ARROW1\0\0")


def arrow_schema(encodings: Mapping[str, Mapping[str, Any]], padding: int = 0) -> pa.Schema:
    """Returns the Arrow schema of a shard.

    Args:
        encodings: column -> encoding and its parameters.
        padding: bytes of filler in the metadata, to move the first buffer to an aligned offset.
    """
    fields: list[pa.Field[Any]] = []
    for column, spec in COLUMNS.items():
        description = {"dtype": spec.dtype, "shape": spec.shape, **encodings[column]}
        for field in stored_fields(column, encodings[column]["encoding"]):
            item = pa.field("item", pa.from_numpy_dtype(np.dtype(field.dtype)), nullable=False)
            fields.append(
                pa.field(
                    field.name,
                    pa.list_(item, field.width),
                    nullable=False,
                    metadata={METADATA_KEY: json.dumps(description).encode()},
                )
            )
    fields.append(pa.field(NAME, pa.utf8(), nullable=False))
    metadata: dict[bytes | str, bytes | str] = {
        METADATA_KEY: json.dumps({"format": FORMAT, "version": VERSION}).encode(),
        b"padding": b" " * padding,
    }
    return pa.schema(fields, metadata=metadata)


def write_ipc(
    sink: Any, stored: dict[str, NDArray[Any]], names: list[str], encodings: Encodings
) -> None:
    """Writes one record batch as an Arrow IPC file with aligned buffers.

    pyarrow 25.0.1 does not expose the alignment option of Arrow's C++ library: it pads buffers to 8
    bytes, and leaves buffers whose size is a multiple of 64 unchanged. Each buffer is therefore
    padded to 64 bytes, and filler in the schema's metadata aligns the first one.

    Args:
        sink: a file object.
        stored: field name -> (rows, width), in file order.
        names: one per row.
        encodings: column -> encoding and its parameters.
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
    """Returns the filler size that moves the first buffer to a multiple of 64 bytes."""
    text = sum(-(-b.size // 8) * 8 for b in batch.column(NAME).buffers() if b is not None)
    head = pa.ipc.get_record_batch_size(batch) - fixed_bytes - text
    for padding in range(2 * ALIGNMENT):
        schema_bytes = arrow_schema(encodings, padding).serialize().size
        if (_MAGIC_BYTES + schema_bytes + head) % ALIGNMENT == 0:
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
