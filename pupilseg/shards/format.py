"""The on-disk format of shards, version 1: files, columns, encodings, manifest.

`docs/format.md` is the full specification. In short: a split is a directory with `manifest.json`,
`SHA256SUMS` and `shard-00000.arrow ...`. A shard is an Arrow IPC *file* (little endian,
uncompressed, one record batch, no nulls). Every column but `name` is a FixedSizeList of a primitive
whose buffer begins at a multiple of 64 bytes in the file, so that it is a NumPy view of the mapped
file:

    column           decoded                 encoding  stored fields
    image            uint8 (400, 640)        raw       image uint8[256000]
    label            uint8 (400, 640) {0,1}  bits      label uint8[32000]
    spatial_weights  float32 (400, 640)      bits      spatial_weights uint8[32000] + value
                                             raw       spatial_weights float32[256000]
    dist_map         float32 (2, 400, 640)   u2        dist_map uint16[256000],
                                                       dist_map_first uint32[400]
                                             raw       dist_map float32[512000]
    ellipse          float32 (4,)            raw       ellipse float32[4]
    ellipse_free     float32 (5,)            raw       ellipse_free float32[5]
    name             text                    -         name utf8

The encoding of a column is a property of each shard file, written in its Arrow field metadata and
in the manifest. Readers refuse a manifest of another format or version.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pupilseg.geometry import HEIGHT, NUM_CLASSES, WIDTH

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa

FORMAT = "pupilseg-shards"
VERSION = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
"""Digests of the shards and the manifest, as `sha256sum --check` reads them."""
ALIGNMENT = 64
"""Bytes: buffers begin at multiples of it, as the Arrow format recommends (a cache line)."""
PIXELS = HEIGHT * WIDTH
METADATA_KEY = b"pupilseg"
RAW, BITS, U2 = "raw", "bits", "u2"
NAME = "name"


class Column(NamedTuple):
    """What a column holds once decoded, and how it may be stored."""

    dtype: str
    shape: tuple[int, ...]
    encodings: tuple[str, ...]


class Field(NamedTuple):
    """One stored Arrow field: `width` values of `dtype` a row."""

    name: str
    dtype: str
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes."""
        return int(np.dtype(self.dtype).itemsize) * self.width


COLUMNS: dict[str, Column] = {
    "image": Column("uint8", (HEIGHT, WIDTH), (RAW,)),
    "label": Column("uint8", (HEIGHT, WIDTH), (BITS,)),
    "spatial_weights": Column("float32", (HEIGHT, WIDTH), (BITS, RAW)),
    "dist_map": Column("float32", (NUM_CLASSES, HEIGHT, WIDTH), (U2, RAW)),
    "ellipse": Column("float32", (4,), (RAW,)),
    "ellipse_free": Column("float32", (5,), (RAW,)),
}
"""Columns in their order in the file; `name` follows them."""

Encodings = dict[str, dict[str, Any]]
"""Column -> {"encoding": ...} and, for two-valued weights, {"value": ...}: those of one shard."""


def shard_name(index: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{index:05d}.arrow"


def sums_text(manifest: Mapping[str, Any], manifest_digest: str) -> str:
    """Returns the text of `SHA256SUMS`: a line a file, digest and name, the manifest last."""
    lines = [f"{entry['sha256']}  {entry['file']}\n" for entry in manifest["files"]]
    return "".join([*lines, f"{manifest_digest}  {MANIFEST}\n"])


def stored_fields(column: str, encoding: str) -> list[Field]:
    """Returns the Arrow fields that hold a column in an encoding.

    Raises:
        KeyError: the column is unknown or cannot have that encoding.
    """
    spec = COLUMNS[column]
    if encoding not in spec.encodings:
        raise KeyError(f"{column} has no encoding {encoding!r}")
    if encoding == BITS:
        return [Field(column, "uint8", PIXELS // 8)]
    if encoding == U2:
        return [Field(column, "uint16", PIXELS), Field(f"{column}_first", "uint32", HEIGHT)]
    return [Field(column, spec.dtype, int(np.prod(spec.shape)))]


def all_fields(encodings: Mapping[str, Mapping[str, Any]]) -> list[Field]:
    """Returns the fields of a shard in file order, `name` left out."""
    return [f for c in COLUMNS for f in stored_fields(c, encodings[c]["encoding"])]


def bytes_per_sample(encodings: Mapping[str, Mapping[str, Any]]) -> int:
    """Returns the bytes that a row takes in the fixed-size fields."""
    return sum(field.row_bytes for field in all_fields(encodings))


def arrow_schema(encodings: Mapping[str, Mapping[str, Any]], padding: int = 0) -> pa.Schema:
    """Returns the Arrow schema of a shard.

    Args:
        encodings: of each column.
        padding: bytes of filler in the metadata, which move the first buffer to an aligned place.
    """
    import pyarrow as pa

    fields: list[pa.Field[Any]] = []
    for column, spec in COLUMNS.items():
        about = {"dtype": spec.dtype, "shape": spec.shape, **encodings[column]}
        for field in stored_fields(column, encodings[column]["encoding"]):
            item = pa.field("item", pa.from_numpy_dtype(np.dtype(field.dtype)), nullable=False)
            fields.append(
                pa.field(
                    field.name,
                    pa.list_(item, field.width),
                    nullable=False,
                    metadata={METADATA_KEY: json.dumps(about).encode()},
                )
            )
    fields.append(pa.field(NAME, pa.utf8(), nullable=False))
    about = {"format": FORMAT, "version": VERSION}
    metadata: dict[bytes | str, bytes | str] = {
        METADATA_KEY: json.dumps(about).encode(),
        b"padding": b" " * padding,
    }
    return pa.schema(fields, metadata=metadata)
