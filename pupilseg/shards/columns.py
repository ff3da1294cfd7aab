"""The columns of a shard under construction: compact encodings where they are exact, else raw.

Only encoded rows are kept in memory. When a row cannot be represented exactly in the compact
encoding of a column, the previous rows are decoded (exactly, since each was checked) and the column
is stored raw from then on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pupilseg import maps
from pupilseg.errors import DataError
from pupilseg.geometry import ellipse_from_mask, ellipse_vector
from pupilseg.shards.codec import (
    FrameDecoder,
    pack_bits,
    pack_squared,
    pack_values,
    stored_fields,
    unpack_values,
    value_table,
)
from pupilseg.shards.format import BITS, COLUMNS, RAW, U2, Encodings, Field

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.sample import Sample


def _rows(field: Field, count: int) -> NDArray[Any]:
    return np.empty((count, field.width), dtype=field.dtype)


def _raw_rows(column: str, count: int) -> NDArray[Any]:
    return _rows(stored_fields(column, RAW)[0], count)


class ShardColumns:
    """All columns of one shard, filled row by row.

    Args:
        capacity: maximum number of rows.
    """

    def __init__(self, capacity: int) -> None:
        self.names: list[str] = []
        self._capacity = capacity
        self._image = _raw_rows("image", capacity)
        self._label = _rows(stored_fields("label", BITS)[0], capacity)
        self._ellipse = _raw_rows("ellipse", capacity)
        self._ellipse_free = _raw_rows("ellipse_free", capacity)
        self._weights = _rows(stored_fields("spatial_weights", BITS)[0], capacity)
        self._weights_value: float | None = None
        self._weights_raw: NDArray[np.float32] | None = None
        field, first_field = stored_fields("dist_map", U2)
        self._squared = _rows(field, capacity)
        self._first = _rows(first_field, capacity)
        self._dist_raw: NDArray[np.float32] | None = None
        self._decoder = FrameDecoder()
        self._maps = np.empty(COLUMNS["dist_map"].shape, dtype=np.float32)
        self._exact = np.empty(COLUMNS["label"].shape, dtype=np.float32)

    def __len__(self) -> int:
        return len(self.names)

    def append(self, sample: Sample, image: NDArray[np.uint8]) -> None:
        """Adds a sample. Targets that its source lacks are computed from the label.

        Args:
            sample: already checked with `check_sample`.
            image: uint8 (400, 640), preprocessed.
        """
        row, label = len(self), sample.label
        self._image[row] = image.reshape(-1)
        self._label[row] = pack_bits(label)
        self._add_weights(row, sample)
        self._add_distances(row, sample)
        vector = sample.ellipse
        self._ellipse[row] = ellipse_vector(label) if vector is None else vector
        self._ellipse_free[row] = ellipse_from_mask(label) or 0.0
        self.names.append(sample.name)

    def _add_weights(self, row: int, sample: Sample) -> None:
        weights = sample.spatial_weights
        if weights is None:
            weights = maps.spatial_weights(sample.label)
        if self._weights_raw is None:
            packed = pack_values(weights, self._weights_value)
            if packed is not None:
                self._weights[row], self._weights_value = packed
                return
            self._weights_raw = _raw_rows("spatial_weights", self._capacity)
            table = value_table(self._weights_value or 0.0)
            for done in range(row):
                unpack_values(self._weights[done], table, self._weights_raw[done])
        self._weights_raw[row] = weights.reshape(-1)

    def _add_distances(self, row: int, sample: Sample) -> None:
        if self._dist_raw is None:
            if self._pack_distances(row, sample):
                return
            self._dist_raw = _raw_rows("dist_map", self._capacity)
            for done in range(row):
                self._decode_maps(done, self._dist_raw[done].reshape(self._maps.shape))
        dist_map = sample.dist_map
        if dist_map is None:
            dist_map = maps.distance_maps(sample.label)
        self._dist_raw[row] = dist_map.reshape(-1)

    def _pack_distances(self, row: int, sample: Sample) -> bool:
        """Packs a row; returns True if decoding it restores the source's maps to the bit.

        If the source has no maps, decoding must restore the packed integers.
        """
        squared, given = self._exact, sample.dist_map
        if given is None:
            maps.write_squared_distance(np.ascontiguousarray(sample.label), squared)
        else:
            maps.write_squared_from_maps(given, squared)
            if not squared.max() <= maps.MAX_DISTANCE_SQUARED:  # NaN compares as false
                return False
        self._squared[row], self._first[row] = pack_squared(squared)
        try:
            if given is not None:
                self._decode_maps(row, self._maps)
                stored = np.ascontiguousarray(given)
                return bool(np.array_equal(self._maps.view(np.uint32), stored.view(np.uint32)))
            # The decoder maps each integer to the value of `maps_from_squared` (tests/shards), so
            # comparing the integers is enough.
            decoded = self._decoder.squared(self._squared[row], self._first[row])
            return bool(np.array_equal(decoded, squared))
        except DataError:  # maps with another definition give impossible integers
            return False

    def _decode_maps(self, row: int, out: NDArray[np.float32]) -> None:
        self._decoder.distances(self._squared[row], self._first[row], self._label[row], out)

    def encodings(self) -> Encodings:
        """Returns the current encoding of each column."""
        found: Encodings = {column: {"encoding": RAW} for column in COLUMNS}
        found["label"] = {"encoding": BITS}
        if self._weights_raw is None:
            found["spatial_weights"] = {"encoding": BITS, "value": self._weights_value or 0.0}
        if self._dist_raw is None:
            found["dist_map"] = {"encoding": U2}
        return found

    def stored(self) -> dict[str, NDArray[Any]]:
        """Returns the stored fields in file order, each (rows, width)."""
        fields = {
            "image": self._image,
            "label": self._label,
            "spatial_weights": self._weights if self._weights_raw is None else self._weights_raw,
        }
        if self._dist_raw is None:
            fields |= {"dist_map": self._squared, "dist_map_first": self._first}
        else:
            fields["dist_map"] = self._dist_raw
        fields |= {"ellipse": self._ellipse, "ellipse_free": self._ellipse_free}
        return {name: array[: len(self)] for name, array in fields.items()}
