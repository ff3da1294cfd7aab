"""Decodes batches of stored rows with torch, on any device, to the numbers of `codec.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pupilseg.errors import DataError
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.maps import MAX_DISTANCE_SQUARED
from pupilseg.shards.codec import IMAGE_TABLE, FrameDecoder, distance_tables
from pupilseg.shards.format import BITS, COLUMNS, RAW, U2, Field, stored_fields

if TYPE_CHECKING:
    from collections.abc import Iterable

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


def gather(
    layout: Layout,
    shards: ShardSet,
    indices: Iterable[int],
    out: dict[str, Tensor],
    decoder: FrameDecoder,
) -> None:
    """Copies the stored fields of samples from the mapping, in the layout.

    Args:
        layout: of the batch.
        shards: open.
        indices: of the samples.
        out: field -> (at least as many rows, width) on the CPU; its first rows are written.
        decoder: gives the scratch.

    Raises:
        DataError: stored bytes are damaged (found here only where decoding is needed).
    """
    arrays = {name: tensor.numpy() for name, tensor in out.items()}
    for number, index in enumerate(indices):
        shard, row = shards.locate(int(index))
        target = {name: array[number] for name, array in arrays.items()}
        try:
            _gather_row(layout, shard, row, target, decoder)
        except DataError as error:
            raise shard.damaged(row, error) from error


def _gather_row(
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


class BatchDecoder:
    """Turns gathered rows into the tensors of a batch, on the device, without synchronising.

    Args:
        layout: of the gathered rows.
        device: where they are.
        label_dtype: of the labels.
    """

    def __init__(self, layout: Layout, device: torch.device, label_dtype: torch.dtype) -> None:
        self._layout, self._label_dtype = layout, label_dtype
        self._image_table = torch.from_numpy(IMAGE_TABLE).to(device)
        self._shifts = torch.arange(8, dtype=torch.uint8, device=device)
        # (2 * 567523,): u^2 -> distance outside a class, then inside it.
        self._distances = torch.from_numpy(distance_tables().copy()).reshape(-1).to(device)

    def __call__(self, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Decodes a batch.

        Args:
            packed: field -> (B, width), as the layout says.

        Returns:
            image float32 (B, 1, 400, 640) in [-1, 1]; label (B, 400, 640) of {0, 1};
            spatial_weights float32 (B, 400, 640); dist_map float32 (B, 2, 400, 640); ellipse
            float32 (B, 4); those that were asked for.
        """
        encodings = self._layout.encodings
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
            if encodings["dist_map"] == U2:
                maps = self._maps(maps, packed["dist_map_first"], label)
            out["dist_map"] = maps.view(-1, 2, HEIGHT, WIDTH)
        if "ellipse" in encodings:
            out["ellipse"] = packed["ellipse"]
        return {column: out[column] for column in self._layout.columns}

    def _bits(self, packed: Tensor) -> Tensor:
        """Returns uint8 (B, 400, 640) of {0, 1} from (B, 32000)."""
        return ((packed[:, :, None] >> self._shifts) & 1).view(-1, HEIGHT, WIDTH)

    def _maps(self, words: Tensor, first: Tensor, label: Tensor) -> Tensor:
        """Returns float32 (B, 2, 400, 640) from u^2 modulo 65,536 and each row's first value."""
        words = words.view(-1, HEIGHT, WIDTH)
        # int16 differences wrap to the true step between neighbours.
        steps = (words[:, :, 1:] - words[:, :, :-1]).int()
        squared = torch.cat([first[:, :, None], steps], dim=2).cumsum(dim=2, dtype=torch.int32)
        # Damaged bytes must not index outside the table: on CUDA that ends the process's context.
        squared = squared.clamp_(0, MAX_DISTANCE_SQUARED)
        inside = label.int() * (MAX_DISTANCE_SQUARED + 1)
        outside = (MAX_DISTANCE_SQUARED + 1) - inside
        both = torch.stack([squared + outside, squared + inside], dim=1)
        return self._distances[both]
