"""The on-disk format of shards, version 1: files, columns and encodings.

`docs/format.md` is the full specification. In short: a split is a directory with `manifest.json`,
`SHA256SUMS` and `shard-00000.arrow ...`. A shard is an Arrow IPC *file* (little endian,
uncompressed, one record batch, no nulls). Every column except `name` is a FixedSizeList of a
primitive whose buffer starts at a multiple of 64 bytes in the file, so it can be viewed as a NumPy
array of the mapped file:

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

The encoding of a column is a property of each shard file. It is written to the Arrow metadata of
the field and to the manifest. Readers reject a manifest of another format or version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pupilseg.geometry import HEIGHT, NUM_CLASSES, WIDTH

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "pupilseg-shards"
VERSION = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
"""Digests of the shards and the manifest, in the format of `sha256sum --check`."""
PIXELS = HEIGHT * WIDTH
RAW, BITS, U2 = "raw", "bits", "u2"
NAME = "name"


class Column(NamedTuple):
    """Dtype and shape of a decoded row, and the encodings it may be stored in."""

    dtype: str
    shape: tuple[int, ...]
    encodings: tuple[str, ...]


class Field(NamedTuple):
    """A stored Arrow field: `width` values of `dtype` per row."""

    name: str
    dtype: str
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return int(np.dtype(self.dtype).itemsize) * self.width


COLUMNS: dict[str, Column] = {
    "image": Column("uint8", (HEIGHT, WIDTH), (RAW,)),
    "label": Column("uint8", (HEIGHT, WIDTH), (BITS,)),
    "spatial_weights": Column("float32", (HEIGHT, WIDTH), (BITS, RAW)),
    "dist_map": Column("float32", (NUM_CLASSES, HEIGHT, WIDTH), (U2, RAW)),
    "ellipse": Column("float32", (4,), (RAW,)),
    "ellipse_free": Column("float32", (5,), (RAW,)),
}
"""Columns in file order; `name` comes last."""

Encodings = dict[str, dict[str, Any]]
"""Column -> {"encoding": ...} of one shard, with {"value": ...} for two-valued weights."""


def shard_name(index: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{index:05d}.arrow"


def sums_text(manifest: Mapping[str, Any], manifest_digest: str) -> str:
    """Returns the text of `SHA256SUMS`: one line per file, the manifest last."""
    lines = [f"{entry['sha256']}  {entry['file']}\n" for entry in manifest["files"]]
    return "".join([*lines, f"{manifest_digest}  {MANIFEST}\n"])
