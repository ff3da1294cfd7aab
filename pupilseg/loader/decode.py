"""Decodes batches of stored rows with torch on any device; same results as `shards.codec`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from pupilseg.geometry import HEIGHT, NORMALIZED, WIDTH
from pupilseg.maps import MAX_DISTANCE_SQUARED
from pupilseg.runtime.compilation import Compiled
from pupilseg.runtime.device import on_device, pinned
from pupilseg.shards.codec import BAND, FrameDecoder, band_rows, distance_tables, stored_fields
from pupilseg.shards.format import BITS, COLUMNS, RAW, U2, Field

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pupilseg.shards.reader import ShardSet

WEIGHT_VALUE = "spatial_weights_value"
"""Field beside bit-packed weights, float32 (1,): the value that a set bit stands for."""
DECODED = ("image", "label", "spatial_weights", "dist_map", "ellipse")
"""Columns of a batch, in the order of `loader.Batch`."""
_SIGNED = {"uint16": "int16", "uint32": "int32"}
"""torch supports few operations on unsigned 16 and 32 bits; the bytes are viewed as signed."""


class Layout(NamedTuple):
    """How the rows of a batch are stored, independent of their shards.

    Attributes:
        columns: columns to decode.
        encodings: column -> encoding of the gathered rows; raw if shards differ.
        fields: gathered fields, with dtypes that torch supports.
    """

    columns: tuple[str, ...]
    encodings: dict[str, str]
    fields: list[Field]

    @property
    def row_bytes(self) -> int:
        """Bytes per gathered row."""
        return sum(field.row_bytes for field in self.fields)

    def empty(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """Returns uninitialized tensors (rows, width), one per field."""
        return {
            field.name: torch.empty(
                (rows, field.width), dtype=getattr(torch, field.dtype), device=device
            )
            for field in self.fields
        }

    def empty_pinned(self, rows: int) -> dict[str, Tensor]:
        """Returns uninitialized tensors (rows, width) in pinned memory, one per field.

        Raises:
            UsageError: the memory cannot be allocated or pinned.
        """
        return {
            field.name: pinned((rows, field.width), getattr(torch, field.dtype))
            for field in self.fields
        }


def layout_of(shards: ShardSet, columns: tuple[str, ...]) -> Layout:
    """Returns the layout in which any row of the shards can be gathered.

    Args:
        shards: the open shards.
        columns: columns to decode, a subset of `DECODED`. Encoded distance maps need the label,
            whose bits are then gathered too.
    """
    encodings = {}
    for column in columns:
        encoding = shards.encoding(column)
        encodings[column] = encoding if encoding in DECODERS else RAW
    if encodings.get("dist_map") == U2:
        encodings["label"] = BITS
    fields = [
        Field(f.name, _SIGNED.get(f.dtype, f.dtype), f.width)
        for column, encoding in encodings.items()
        for f in stored_fields(column, encoding)
    ]
    if encodings.get("spatial_weights") == BITS:
        fields.append(Field(WEIGHT_VALUE, "float32", 1))
    return Layout(columns, encodings, fields)


def gather_row(
    layout: Layout,
    shards: ShardSet,
    indices: Sequence[int] | NDArray[np.int64],
    out: dict[str, Tensor],
    row: int,
    decoder: FrameDecoder,
) -> None:
    """Copies the stored fields of a sample from the mapped file.

    A column whose encoding in the shard differs from the layout is decoded.

    Args:
        layout: layout of the batch.
        shards: the open shards.
        indices: samples of the batch.
        out: field -> (at least as many rows, width) on the CPU.
        row: position in `indices`, and row of `out` to write.
        decoder: provides scratch memory.

    Raises:
        DataError: stored bytes are damaged (detected here only if a column is decoded).
    """
    shard, stored_row = shards.locate(int(indices[row]))
    target = {name: tensor[row].numpy() for name, tensor in out.items()}
    stored = shard.row(stored_row)
    decoded = {}
    for column, encoding in layout.encodings.items():
        own = shard.encodings[column]
        if own["encoding"] == encoding:
            for field in stored_fields(column, encoding):
                target[field.name][:] = stored[field.name].view(target[field.name].dtype)
        else:
            decoded[column] = target[column].reshape(COLUMNS[column].shape)
    shard.decode(stored_row, decoded, decoder)
    if WEIGHT_VALUE in target:
        target[WEIGHT_VALUE][0] = shard.encodings["spatial_weights"]["value"]


@cache
def distance_table(device: torch.device) -> Tensor:
    """Returns `maps.signed_tables()` as one row on a device, float32 (1135046,).

    Computed once per device, on the CPU, since not every device supports float64.
    """
    return on_device(torch.from_numpy(distance_tables().copy()).reshape(-1), device)


def signed_maps(squared: Tensor, label: Tensor, table: Tensor) -> Tensor:
    """Returns both signed distance maps, equal to `maps.maps_from_squared` to the bit.

    Args:
        squared: int32 (N, H, W) in 0 .. `MAX_DISTANCE_SQUARED`.
        label: (N, H, W), the label that the distances belong to.
        table: `distance_table` of the device.

    Returns:
        float32 (N, 2, H, W).
    """
    inside = (label != 0).int() * (MAX_DISTANCE_SQUARED + 1)
    outside = (MAX_DISTANCE_SQUARED + 1) - inside
    return table[torch.stack([squared + outside, squared + inside], dim=1)]


class BatchDecoder:
    """Decodes batches of stored rows on their device, without synchronizing.

    Args:
        layout: layout of the rows.
        device: device of the rows.
        label_dtype: dtype of the decoded labels.
        compiled_rows: batch size for which decoding is compiled with `torch.compile` into one fused
            pass, at the first such batch. Batches of other sizes, such as a short last batch, run
            the same operations one by one. 0 compiles nothing.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        label_dtype: torch.dtype,
        compiled_rows: int = 0,
    ) -> None:
        self._layout = layout
        self._label_dtype = label_dtype
        self._compiled_rows = compiled_rows
        self._compiled = Compiled(self._decode, "decoding")
        self._image_table = torch.from_numpy(NORMALIZED).to(device)
        self._shifts = torch.arange(8, dtype=torch.uint8, device=device)
        self._distances = distance_table(device) if "dist_map" in layout.encodings else None

    def __call__(self, packed: dict[str, Tensor], rows: Tensor | None = None) -> dict[str, Tensor]:
        """Decodes a batch.

        Args:
            packed: field -> (N, width), the fields of the layout.
            rows: int64 (B,), the rows to decode, in this order; all N rows by default.

        Returns:
            image float32 (B, 1, 400, 640) in [-1, 1]; label (B, 400, 640) of {0, 1};
            spatial_weights float32 (B, 400, 640); dist_map float32 (B, 2, 400, 640); ellipse
            float32 (B, 4). Only the columns of the layout, in new memory.
        """
        count = len(next(iter(packed.values())) if rows is None else rows)
        decode = self._compiled if count == self._compiled_rows else self._decode
        with torch.no_grad():
            return decode(packed, rows)

    def _decode(self, packed: dict[str, Tensor], rows: Tensor | None) -> dict[str, Tensor]:
        encodings = self._layout.encodings
        if rows is not None:
            packed = {name: field.index_select(0, rows) for name, field in packed.items()}
        out: dict[str, Tensor] = {}
        for column in DECODED:  # the label before the distance maps, which need it
            if column in encodings:
                out[column] = DECODERS[encodings[column]](self, column, packed, out)
        if rows is None:  # raw columns are still the caller's memory
            raw = [column for column in out if encodings[column] == RAW and column != "image"]
            out |= {column: out[column].clone() for column in raw}
        if "image" in out:
            image = self._image_table[out["image"].int()]
            out["image"] = image.view(-1, 1, HEIGHT, WIDTH)
        if "label" in out:
            out["label"] = out["label"].to(self._label_dtype)
        return {column: out[column] for column in self._layout.columns}

    def raw(self, column: str, packed: dict[str, Tensor], _decoded: dict[str, Tensor]) -> Tensor:
        """Returns a view of a column that is stored as it is."""
        return packed[column].view(-1, *COLUMNS[column].shape)

    def bits(self, column: str, packed: dict[str, Tensor], _decoded: dict[str, Tensor]) -> Tensor:
        """Returns a label of {0, 1} as uint8, or weights of {0, value} as float32."""
        bits = ((packed[column][:, :, None] >> self._shifts) & 1).view(-1, HEIGHT, WIDTH)
        if column == "label":
            return bits
        value = packed[WEIGHT_VALUE][:, :, None]
        return torch.where(bits != 0, value, torch.zeros_like(value))

    def u2(self, column: str, packed: dict[str, Tensor], decoded: dict[str, Tensor]) -> Tensor:
        """Returns both distance maps from u^2 and the label."""
        assert self._distances is not None
        squared = self._squared(packed[column], packed[f"{column}_first"])
        return signed_maps(squared, decoded["label"], self._distances)

    def _squared(self, words: Tensor, first: Tensor) -> Tensor:
        """Returns u^2, int32 (B, 400, 640), from its low 16 bits and each row's first value."""
        words = words.view(-1, HEIGHT, WIDTH)
        middle = band_rows(words)
        start = first[:, BAND // 2 :: BAND, None]
        steps = _wrapped(middle[:, :, 1:], middle[:, :, :-1])
        along = torch.cat([start, steps], dim=2).cumsum(dim=2, dtype=torch.int32)
        away = _wrapped(words.view(-1, HEIGHT // BAND, BAND, WIDTH), middle[:, :, None])
        squared = (along[:, :, None] + away).view(-1, HEIGHT, WIDTH)
        # Damaged bytes must not index outside the table, which would corrupt the CUDA context.
        return squared.clamp(0, MAX_DISTANCE_SQUARED)


def _wrapped(value: Tensor, other: Tensor) -> Tensor:
    """Returns the difference of int16 numbers, wrapped to 16 bits, as int32.

    The wrap is explicit, so that the result does not depend on how a compiler widens int16.
    """
    return ((value.int() - other + 0x8000) & 0xFFFF) - 0x8000


DECODERS: dict[str, Callable[[BatchDecoder, str, dict[str, Tensor], dict[str, Tensor]], Tensor]] = {
    RAW: BatchDecoder.raw,
    BITS: BatchDecoder.bits,
    U2: BatchDecoder.u2,
}
"""Encoding -> method that decodes a column of a batch, given the columns decoded before it.

An encoding that is not listed is decoded by `shards.codec.FrameDecoder` while rows are gathered."""
