"""Encodings of a frame's columns in NumPy, exact in both directions.

`ENCODINGS` lists them: a new encoding is one entry there, plus its name in `format.COLUMNS`.
Decoders write into arrays that the caller owns and reuses, because allocating a new batch takes
four times as long as copying it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from pupilseg.errors import DataError
from pupilseg.geometry import HEIGHT, NORMALIZED, WIDTH
from pupilseg.maps import (
    MAX_DISTANCE_SQUARED,
    signed_tables,
    swap_in_pupil,
    write_signed_distances,
)
from pupilseg.shards.format import BITS, COLUMNS, PIXELS, RAW, U2, Field

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    StoredRow = Mapping[str, NDArray[Any]]

BYTE_BITS: NDArray[np.uint8] = np.unpackbits(
    np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
)
"""uint8 (256, 8): the bits of each byte, least significant first."""
BAND = 40
"""Number of rows restored from one stored row, the middle one; see `band_rows`."""


@cache
def distance_tables() -> NDArray[np.float32]:
    """Returns `maps.signed_tables()`, computed once per process and read-only."""
    tables = signed_tables()
    tables.flags.writeable = False
    return tables


def pack_bits(mask: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Returns a mask (400, 640) as bits, uint8 (32000,): pixel i in bit i % 8 of byte i // 8."""
    return np.packbits(mask.reshape(-1) != 0, bitorder="little")


def unpack_bits(bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns uint8 (400, 640) of {0, 1} from uint8 (32000,)."""
    return np.unpackbits(bits, bitorder="little").reshape(HEIGHT, WIDTH)


def value_table(value: float) -> NDArray[np.float32]:
    """Returns float32 (256, 8): the 8 values of {0, value} that each byte stands for."""
    return np.where(BYTE_BITS != 0, np.float32(value), np.float32(0)).astype(np.float32)


def unpack_values(
    bits: NDArray[np.uint8], table: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """Writes a two-valued map, float32 (400, 640), from its bits and `value_table`."""
    # A byte is always a valid index of the 256 rows; mode "clip" avoids the buffering of "raise".
    np.take(table, bits, axis=0, out=out.reshape(-1, 8), mode="clip")


def pack_values(
    values: NDArray[np.float32], value: float | None
) -> tuple[NDArray[np.uint8], float | None] | None:
    """Returns a map of {0, v} as bits with v, or None if it has other values.

    The result is checked by decoding it and comparing every bit.

    Args:
        values: float32 (400, 640).
        value: v of the previous rows; None if all of them are zero.

    Returns:
        (bits, v); v stays None if all values are zero.
    """
    words = np.ascontiguousarray(values).view(np.uint32)
    bits = pack_bits(words)
    if value is None and bits.any():
        value = float(values.reshape(-1)[np.argmax(words.reshape(-1) != 0)])
    decoded = np.empty((HEIGHT, WIDTH), dtype=np.float32)
    unpack_values(bits, value_table(value or 0.0), decoded)
    return (bits, value) if np.array_equal(decoded.view(np.uint32), words) else None


def pack_squared(
    squared: NDArray[np.int32 | np.float32],
) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """Returns u^2 modulo 65,536 and each row's first value.

    Args:
        squared: int32 or float32 (400, 640) of integers 0 .. 567,522.

    Returns:
        uint16 (256000,) and uint32 (400,). Neighbors in a row differ by at most 2 * 753 + 1 = 1507,
        so int16 differences of the first array restore a row from its entry in the second.
    """
    # Converted to int32 first: converting a float beyond the range of uint16 is undefined.
    words = squared.astype(np.int32, copy=False).astype(np.uint16)
    return words.reshape(-1), squared[:, 0].astype(np.uint32)


def band_rows(words: Any) -> Any:
    """Returns the middle row of each band of `BAND` rows, a view (..., 10, 640) of (..., 400, 640).

    u changes by at most 1 between neighboring pixels, and no pixel of a band is more than 20 rows
    from the middle row. u^2 therefore differs by at most 20 * 2 * 753.4 = 30,136 along a column of
    the band, so int16 differences restore the band from its middle row, without a cumulative sum
    along every row.
    """
    return words[..., BAND // 2 :: BAND, :]


def write_network_input(image: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Writes a stored image, uint8 (256000,) or (400, 640), as float32 (400, 640) in [-1, 1]."""
    cv2.LUT(image.reshape(HEIGHT, WIDTH), NORMALIZED, dst=out)


class FrameDecoder:
    """Decodes single frames into given arrays.

    It keeps scratch memory, so an object may be used by one thread at a time. All methods release
    the GIL in NumPy and OpenCV.
    """

    def __init__(self) -> None:
        self._away = np.empty((HEIGHT // BAND, BAND, WIDTH), dtype=np.int16)
        self._middle = np.empty((HEIGHT // BAND, WIDTH), dtype=np.float32)
        self._squared = np.empty((HEIGHT, WIDTH), dtype=np.float32)
        self._scaled = np.empty((HEIGHT, WIDTH), dtype=np.float64)
        self._tables: dict[float, NDArray[np.float32]] = {}

    def decode(
        self, column: str, stored: StoredRow, encoding: Mapping[str, Any], out: NDArray[Any]
    ) -> None:
        """Writes one column of a row.

        Args:
            column: a key of `format.COLUMNS`.
            stored: field name -> (width,), the row as it is in the file.
            encoding: the shard's entry for the column: "encoding" and its parameters.
            out: shape of the column; of its dtype, or any integer type for the label.

        Raises:
            DataError: the stored bytes are damaged.
        """
        ENCODINGS[encoding["encoding"]].decode(self, column, stored, encoding, out)

    def raw(
        self, column: str, stored: StoredRow, _encoding: Mapping[str, Any], out: NDArray[Any]
    ) -> None:
        """Copies a column that is stored as it is."""
        out[...] = stored[column].reshape(out.shape)

    def bits(
        self, column: str, stored: StoredRow, encoding: Mapping[str, Any], out: NDArray[Any]
    ) -> None:
        """Unpacks a label of {0, 1}, or weights of {0, value}."""
        if "value" in encoding:
            self.weights(stored[column], encoding["value"], out)
        else:
            out[...] = unpack_bits(stored[column])

    def u2(
        self, column: str, stored: StoredRow, _encoding: Mapping[str, Any], out: NDArray[Any]
    ) -> None:
        """Restores both distance maps from u^2 and the label."""
        self.distances(stored[column], stored[f"{column}_first"], stored["label"], out)

    def weights(self, stored: NDArray[np.uint8], value: float, out: NDArray[np.float32]) -> None:
        """Writes weights of {0, value}, float32 (400, 640), from bits."""
        if value not in self._tables:
            self._tables[value] = value_table(value)
        unpack_values(stored, self._tables[value], out)

    def squared(self, stored: NDArray[np.uint16], first: NDArray[np.uint32]) -> NDArray[np.float32]:
        """Returns u^2, float32 (400, 640), from its low 16 bits and each row's first value.

        Exact, since float32 holds integers up to 2^24. The result is valid until the next call.

        Raises:
            DataError: the two arguments contradict each other, so the stored bytes are damaged.
        """
        words = stored.reshape(HEIGHT, WIDTH).view(np.int16)
        middle = band_rows(words)
        self._middle[:, 0] = first[BAND // 2 :: BAND]
        # int16 differences wrap around to the correct step.
        np.subtract(middle[:, 1:], middle[:, :-1], out=self._middle[:, 1:], dtype=np.int16)
        np.cumsum(self._middle, axis=1, out=self._middle)
        np.subtract(words.reshape(self._away.shape), middle[:, None], out=self._away)
        bands = self._squared.reshape(self._away.shape)
        # Two passes in float32: adding int16 and float64 in one pass takes twice as long.
        np.copyto(bands, self._away)
        bands += self._middle[:, None]
        if not np.array_equal(self._squared[:, 0], first):
            row = int(np.argmax(self._squared[:, 0] != first))
            raise DataError(
                f"dist_map starts row {row} with the squared distance {self._squared[row, 0]:.0f}, "
                f"but dist_map_first has {first[row]}"
            )
        return self._squared

    def distances(
        self,
        stored: NDArray[np.uint16],
        first: NDArray[np.uint32],
        label_bits: NDArray[np.uint8],
        out: NDArray[np.float32],
    ) -> None:
        """Writes both signed distance maps, float32 (2, 400, 640), from u^2 and the label.

        Raises:
            DataError: as `squared`, or a value is outside 0..567,522.
        """
        squared = self.squared(stored, first)
        write_signed_distances(squared, self._scaled, out)
        # A valid distance is at most the diagonal. The root of a negative number is NaN, for which
        # the comparison is false.
        if not out[1].max() <= 1:
            raise DataError(
                f"dist_map holds squared distances {squared.min():.0f}..{squared.max():.0f}, "
                f"expected 0..{MAX_DISTANCE_SQUARED}"
            )
        _swap_in_pupil(label_bits.reshape(HEIGHT, WIDTH // 8), out)


def _swap_in_pupil(bits: NDArray[np.uint8], maps: NDArray[np.float32]) -> None:
    """Swaps the two maps, float32 (2, 400, 640), where the label is 1.

    Args:
        bits: the label, uint8 (400, 80).
        maps: modified within the smallest box of whole bytes around the pupil.
    """
    rows = np.flatnonzero(bits.max(axis=1))
    if rows.size == 0:
        return
    columns = np.flatnonzero(bits[rows[0] : rows[-1] + 1].max(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    pupil = np.unpackbits(bits[top:bottom, left:right], axis=1, bitorder="little").view(np.bool_)
    swap_in_pupil(maps[:, top:bottom, 8 * left : 8 * right], pupil)


class Encoding(NamedTuple):
    """One way to store a column.

    Attributes:
        fields: column -> the Arrow fields that hold it.
        decode: method of `FrameDecoder` that writes one row; arguments as its `decode`.
    """

    fields: Callable[[str], list[Field]]
    decode: Callable[[FrameDecoder, str, StoredRow, Mapping[str, Any], NDArray[Any]], None]


def _raw_fields(column: str) -> list[Field]:
    spec = COLUMNS[column]
    return [Field(column, spec.dtype, int(np.prod(spec.shape)))]


def _bits_fields(column: str) -> list[Field]:
    return [Field(column, "uint8", PIXELS // 8)]


def _u2_fields(column: str) -> list[Field]:
    return [Field(column, "uint16", PIXELS), Field(f"{column}_first", "uint32", HEIGHT)]


ENCODINGS: dict[str, Encoding] = {
    RAW: Encoding(_raw_fields, FrameDecoder.raw),
    BITS: Encoding(_bits_fields, FrameDecoder.bits),
    U2: Encoding(_u2_fields, FrameDecoder.u2),
}
"""Encodings by their name in manifests. The loader's form for batches is `loader.decode.DECODERS`;
an encoding that is missing there is decoded row by row before it is copied to a device."""


def stored_fields(column: str, encoding: str) -> list[Field]:
    """Returns the Arrow fields that hold a column in an encoding.

    Raises:
        KeyError: the column is unknown or cannot have that encoding.
    """
    if encoding not in COLUMNS[column].encodings:
        raise KeyError(f"{column} has no encoding {encoding!r}")
    return ENCODINGS[encoding].fields(column)


def all_fields(encodings: Mapping[str, Mapping[str, Any]]) -> list[Field]:
    """Returns the fields of a shard in file order, without `name`."""
    return [f for c in COLUMNS for f in stored_fields(c, encodings[c]["encoding"])]


def bytes_per_sample(encodings: Mapping[str, Mapping[str, Any]]) -> int:
    """Returns the bytes per row of all fields except `name`."""
    return sum(field.row_bytes for field in all_fields(encodings))
