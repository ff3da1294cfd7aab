"""Decodes batches of stored rows with torch, on any device, to the numbers of `codec.py`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pupilseg.errors import DataError
from pupilseg.geometry import HEIGHT, IMAGE_TABLE, WIDTH
from pupilseg.maps import MAX_DISTANCE_SQUARED
from pupilseg.runtime.compilation import Compiled
from pupilseg.runtime.device import on_device
from pupilseg.shards.codec import BAND, FrameDecoder, band_rows, distance_tables
from pupilseg.shards.format import BITS, COLUMNS, RAW, U2, Field, stored_fields

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from pupilseg.shards.mapped import Shard
    from pupilseg.shards.reader import ShardSet

WEIGHT_VALUE = "spatial_weights_value"
"""Field beside bit-packed weights, float32 (1,): the value that a set bit stands for."""
DECODED = ("image", "label", "spatial_weights", "dist_map", "ellipse")
"""Columns of a batch, in the order of `loader.Batch`."""
_SIGNED = {"uint16": "int16", "uint32": "int32"}
"""torch computes little in unsigned 16 and 32 bits; the same bytes do as signed numbers."""


class Layout(NamedTuple):
    """How every row of a batch is stored, whatever its shard.

    Attributes:
        columns: to be decoded.
        encodings: column -> encoding, of those to be gathered; raw where shards differ.
        fields: what is gathered, dtypes as torch takes them.
    """

    columns: tuple[str, ...]
    encodings: dict[str, str]
    fields: list[Field]

    @property
    def row_bytes(self) -> int:
        """Bytes of a gathered row."""
        return sum(field.row_bytes for field in self.fields)

    def empty(self, rows: int, device: torch.device, *, pinned: bool = False) -> dict[str, Tensor]:
        """Returns uninitialised tensors (rows, width), one a field."""
        return {
            field.name: torch.empty(
                (rows, field.width),
                dtype=getattr(torch, field.dtype),
                device=device,
                pin_memory=pinned,
            )
            for field in self.fields
        }


def layout_of(shards: ShardSet, columns: tuple[str, ...]) -> Layout:
    """Returns the layout in which any row of the shards can be gathered.

    Args:
        shards: open.
        columns: those wanted, out of `DECODED`. Distance maps are signed by the label, so they
            bring its bits with them.
    """
    encodings = {column: shards.encoding(column) or RAW for column in columns}
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
    """Copies the stored fields of a sample from the mapping, in the layout.

    Args:
        layout: of the batch.
        shards: open.
        indices: of the batch's samples.
        out: field -> (at least as many rows, width) on the CPU.
        row: which of the samples, and the row of `out` that is written.
        decoder: gives the scratch.

    Raises:
        DataError: stored bytes are damaged (found here only where decoding is needed).
    """
    shard, stored_row = shards.locate(int(indices[row]))
    target = {name: tensor[row].numpy() for name, tensor in out.items()}
    try:
        _copy_row(layout, shard, stored_row, target, decoder)
    except DataError as error:
        raise shard.damaged(stored_row, error) from error


def _copy_row(
    layout: Layout, shard: Shard, row: int, out: dict[str, NDArray[Any]], decoder: FrameDecoder
) -> None:
    """Copies one row; decodes what its shard packs and the layout does not."""
    stored = shard.row(row)
    for column, encoding in layout.encodings.items():
        own = shard.encodings[column]
        if own["encoding"] == encoding:
            for field in stored_fields(column, encoding):
                np.copyto(out[field.name], stored[field.name].view(out[field.name].dtype))
        elif own["encoding"] == U2:
            maps = out[column].reshape(COLUMNS[column].shape)
            decoder.distances(stored[column], stored[f"{column}_first"], stored["label"], maps)
        else:
            decoder.weights(stored[column], own["value"], out[column].reshape(HEIGHT, WIDTH))
        if column == "spatial_weights" and encoding == BITS:
            out[WEIGHT_VALUE][0] = own["value"]


@cache
def distance_table(device: torch.device) -> Tensor:
    """Returns `maps.signed_tables()` in one row on a device, float32 (1135046,).

    Made once a device; the tables are formed on the CPU, since not every device has float64.
    """
    return on_device(torch.from_numpy(distance_tables().copy()).reshape(-1), device)


def signed_maps(squared: Tensor, label: Tensor, table: Tensor) -> Tensor:
    """Returns both signed distance maps, as `maps.maps_from_squared`, to the bit.

    Args:
        squared: int32 (N, H, W) of 0 .. `MAX_DISTANCE_SQUARED`.
        label: (N, H, W), the label that they are of.
        table: `distance_table` of the device.

    Returns:
        float32 (N, 2, H, W).
    """
    inside = (label != 0).int() * (MAX_DISTANCE_SQUARED + 1)
    outside = (MAX_DISTANCE_SQUARED + 1) - inside
    return table[torch.stack([squared + outside, squared + inside], dim=1)]


class BatchDecoder:
    """Turns stored rows into the tensors of a batch, on the device, without synchronising.

    Args:
        layout: of the rows.
        device: where they are.
        label_dtype: of the labels.
        compiled_rows: batches of this size go through one fused pass of `torch.compile`, made at
            the first of them; others, such as a short last one, and all with 0, through the same
            operations one by one.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        label_dtype: torch.dtype,
        compiled_rows: int = 0,
    ) -> None:
        self._layout, self._label_dtype = layout, label_dtype
        self._compiled_rows, self._compiled = compiled_rows, Compiled(self._decode, "decoding")
        self._image_table = torch.from_numpy(IMAGE_TABLE).to(device)
        self._shifts = torch.arange(8, dtype=torch.uint8, device=device)
        self._distances = distance_table(device) if "dist_map" in layout.encodings else None

    def __call__(self, packed: dict[str, Tensor], rows: Tensor | None = None) -> dict[str, Tensor]:
        """Decodes a batch.

        Args:
            packed: field -> (N, width), as the layout says.
            rows: int64 (B,), those of the N to decode, in this order; all of them without it.

        Returns:
            image float32 (B, 1, 400, 640) in [-1, 1]; label (B, 400, 640) of {0, 1};
            spatial_weights float32 (B, 400, 640); dist_map float32 (B, 2, 400, 640); ellipse
            float32 (B, 4); those that were asked for, in memory of their own.
        """
        count = len(next(iter(packed.values())) if rows is None else rows)
        form = self._compiled if count == self._compiled_rows else self._decode
        with torch.no_grad():
            return form(packed, rows)

    def _decode(self, packed: dict[str, Tensor], rows: Tensor | None) -> dict[str, Tensor]:
        encodings = self._layout.encodings
        if rows is not None:
            packed = {name: field.index_select(0, rows) for name, field in packed.items()}
        out: dict[str, Tensor] = {}
        if "image" in encodings:
            image = self._image_table[packed["image"].int()]
            out["image"] = image.view(-1, 1, HEIGHT, WIDTH)
        if "label" in encodings:
            label = self._bits(packed["label"])
            out["label"] = label.to(self._label_dtype)
        if "spatial_weights" in encodings:
            weights = packed["spatial_weights"]
            if encodings["spatial_weights"] == BITS:
                value = packed[WEIGHT_VALUE][:, :, None]
                weights = torch.where(self._bits(weights) != 0, value, torch.zeros_like(value))
            out["spatial_weights"] = weights.view(-1, HEIGHT, WIDTH)
        if "dist_map" in encodings:
            maps = packed["dist_map"]
            if self._distances is not None and encodings["dist_map"] == U2:
                squared = self._squared(maps, packed["dist_map_first"])
                maps = signed_maps(squared, label, self._distances)
            out["dist_map"] = maps.view(-1, 2, HEIGHT, WIDTH)
        if "ellipse" in encodings:
            out["ellipse"] = packed["ellipse"]
        if rows is None:  # raw columns are still the caller's memory
            raw = [column for column in out if encodings[column] == RAW and column != "image"]
            out |= {column: out[column].clone() for column in raw}
        return {column: out[column] for column in self._layout.columns}

    def _bits(self, packed: Tensor) -> Tensor:
        """Returns uint8 (B, 400, 640) of {0, 1} from (B, 32000)."""
        return ((packed[:, :, None] >> self._shifts) & 1).view(-1, HEIGHT, WIDTH)

    def _squared(self, words: Tensor, first: Tensor) -> Tensor:
        """Returns u^2, int32 (B, 400, 640), from its low 16 bits and each row's first value."""
        words = words.view(-1, HEIGHT, WIDTH)
        middle = band_rows(words)
        start = first[:, BAND // 2 :: BAND, None]
        steps = _wrapped(middle[:, :, 1:], middle[:, :, :-1])
        along = torch.cat([start, steps], dim=2).cumsum(dim=2, dtype=torch.int32)
        away = _wrapped(words.view(-1, HEIGHT // BAND, BAND, WIDTH), middle[:, :, None])
        squared = (along[:, :, None] + away).view(-1, HEIGHT, WIDTH)
        # Damaged bytes must not index outside the table: on CUDA that ends the process's context.
        return squared.clamp(0, MAX_DISTANCE_SQUARED)


def _wrapped(value: Tensor, other: Tensor) -> Tensor:
    """Returns the difference of int16 numbers as int16 arithmetic wraps it, int32.

    Spelt out, so that it does not hang on how a compiler widens int16.
    """
    return ((value.int() - other + 0x8000) & 0xFFFF) - 0x8000
