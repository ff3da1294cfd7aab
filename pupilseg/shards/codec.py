"""Encodings of a frame's columns, in NumPy: exact both ways, without temporaries where it counts.

A decoder writes into arrays that the caller owns and reuses: allocating a fresh batch costs four
times the copying.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pupilseg.errors import DataError
from pupilseg.geometry import HEIGHT, IMAGE_TABLE, WIDTH
from pupilseg.maps import (
    MAX_DISTANCE_SQUARED,
    exchange_in_pupil,
    signed_tables,
    write_signed_distances,
)
from pupilseg.shards.format import COLUMNS, RAW, U2, Encodings

if TYPE_CHECKING:
    from numpy.typing import NDArray

BYTE_BITS: NDArray[np.uint8] = np.unpackbits(
    np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
)
"""uint8 (256, 8): the bits of each byte, least significant first."""
BAND = 40
"""Rows that are restored from the one in their middle; see `band_rows`."""


@cache
def distance_tables() -> NDArray[np.float32]:
    """Returns `maps.signed_tables()`, made once a process and read-only."""
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
    """Returns float32 (256, 8): for each byte of a two-valued map its 8 values of {0, value}."""
    return np.where(BYTE_BITS != 0, np.float32(value), np.float32(0)).astype(np.float32)


def unpack_values(
    bits: NDArray[np.uint8], table: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """Writes a two-valued map into `out`, float32 (400, 640), from bits and its `value_table`."""
    # `clip` cannot clip a byte in a table of 256; it spares the buffering that `raise` implies.
    np.take(table, bits, axis=0, out=out.reshape(-1, 8), mode="clip")


def pack_values(
    values: NDArray[np.float32], value: float | None
) -> tuple[NDArray[np.uint8], float | None] | None:
    """Returns a map of {0, v} as bits with v, or None if it is not one.

    Args:
        values: float32 (400, 640).
        value: v of the rows before, None if none has been met yet.

    Returns:
        (bits, v); v stays None for a map of zeros. Checked by decoding, to the bit.
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
        uint16 (256000,) and uint32 (400,). Neighbours in a row differ by at most
        2 * 753 + 1 = 1507, so int16 differences of the first restore the row from the second.
    """
    # Through int32: what a float beyond uint16 becomes is not defined.
    words = squared.astype(np.int32, copy=False).astype(np.uint16)
    return words.reshape(-1), squared[:, 0].astype(np.uint32)


def band_rows(words: Any) -> Any:
    """Returns the middle row of each band of `BAND` rows, a view (..., 10, 640) of (..., 400, 640).

    u changes by at most 1 from row to row, as from pixel to pixel. In a band no pixel is more than
    20 rows from the middle one, so that u^2 differs from there by at most 20 * 2 * 753.4 = 30,136:
    int16 differences restore u^2 of a band from its middle row, without following every row.
    """
    return words[..., BAND // 2 :: BAND, :]


class FrameDecoder:
    """Decodes single frames into given arrays; keeps its scratch, so one object serves one thread.

    Every method takes stored rows as `ShardSet` gives them and writes its last argument. NumPy and
    OpenCV release the GIL in all of them.
    """

    def __init__(self) -> None:
        self._away = np.empty((HEIGHT // BAND, BAND, WIDTH), dtype=np.int16)
        self._middle = np.empty((HEIGHT // BAND, WIDTH), dtype=np.float32)
        self._squared = np.empty((HEIGHT, WIDTH), dtype=np.float32)
        self._scaled = np.empty((HEIGHT, WIDTH), dtype=np.float64)
        self._tables: dict[float, NDArray[np.float32]] = {}

    def image(self, stored: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Writes the network input, float32 (400, 640) in [-1, 1], from grey values."""
        cv2.LUT(stored.reshape(HEIGHT, WIDTH), IMAGE_TABLE, dst=out)

    def label(self, stored: NDArray[np.uint8], out: NDArray[np.generic]) -> None:
        """Writes a label of {0, 1}, any integer type (400, 640), from bits."""
        out[...] = unpack_bits(stored)

    def weights(self, stored: NDArray[np.uint8], value: float, out: NDArray[np.float32]) -> None:
        """Writes weights of {0, value}, float32 (400, 640), from bits."""
        if value not in self._tables:
            self._tables[value] = value_table(value)
        unpack_values(stored, self._tables[value], out)

    def squared(self, stored: NDArray[np.uint16], first: NDArray[np.uint32]) -> NDArray[np.float32]:
        """Returns u^2, float32 (400, 640), from its low 16 bits and each row's first value.

        Exact: float32 holds integers up to 2^24. The array is scratch: valid until the next call.

        Raises:
            DataError: the two contradict each other, so the stored bytes are damaged.
        """
        words = stored.reshape(HEIGHT, WIDTH).view(np.int16)
        middle = band_rows(words)
        self._middle[:, 0] = first[BAND // 2 :: BAND]
        # int16 differences wrap to the true step.
        np.subtract(middle[:, 1:], middle[:, :-1], out=self._middle[:, 1:], dtype=np.int16)
        np.cumsum(self._middle, axis=1, out=self._middle)
        np.subtract(words.reshape(self._away.shape), middle[:, None], out=self._away)
        bands = self._squared.reshape(self._away.shape)
        # In two passes and float32: adding int16 and float64 in one takes twice as long.
        np.copyto(bands, self._away)
        bands += self._middle[:, None]
        if not np.array_equal(self._squared[:, 0], first):
            row = int(np.argmax(self._squared[:, 0] != first))
            raise DataError(
                f"dist_map begins row {row} with the squared distance {self._squared[row, 0]:.0f}, "
                f"dist_map_first says {first[row]}"
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
            DataError: as `squared`, or a value that no distance has.
        """
        squared = self.squared(stored, first)
        write_signed_distances(squared, self._scaled, out)
        # The largest distance is the diagonal; the root of a negative number compares as false.
        if not out[1].max() <= 1:
            raise DataError(
                f"dist_map holds squared distances {squared.min():.0f}..{squared.max():.0f}, "
                f"expected 0..{MAX_DISTANCE_SQUARED}"
            )
        _exchange_in_pupil(label_bits.reshape(HEIGHT, WIDTH // 8), out)


def _exchange_in_pupil(bits: NDArray[np.uint8], maps: NDArray[np.float32]) -> None:
    """Exchanges two maps, float32 (2, 400, 640), where the label is 1.

    Args:
        bits: of the label, uint8 (400, 80).
        maps: written to within the smallest box of whole bytes around the pupil.
    """
    rows = np.flatnonzero(bits.max(axis=1))
    if rows.size == 0:
        return
    columns = np.flatnonzero(bits[rows[0] : rows[-1] + 1].max(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    pupil = np.unpackbits(bits[top:bottom, left:right], axis=1, bitorder="little").view(np.bool_)
    exchange_in_pupil(maps[:, top:bottom, 8 * left : 8 * right], pupil)


def decode_row(
    stored: dict[str, NDArray[Any]], encodings: Encodings, decoder: FrameDecoder
) -> dict[str, NDArray[Any]]:
    """Returns every column of one row, decoded into new arrays.

    Args:
        stored: field name -> (width,), as in the file.
        encodings: of the row's shard.
        decoder: gives the scratch.

    Returns:
        Column name -> array of the dtype and shape in `format.COLUMNS`.

    Raises:
        DataError: the stored bytes are damaged.
    """
    row: dict[str, NDArray[Any]] = {}
    for column, spec in COLUMNS.items():
        encoding = encodings[column]
        if encoding["encoding"] == RAW:
            row[column] = stored[column].reshape(spec.shape).copy()
            continue
        out = row[column] = np.empty(spec.shape, dtype=spec.dtype)
        if encoding["encoding"] == U2:
            decoder.distances(stored[column], stored[f"{column}_first"], stored["label"], out)
        elif column == "label":
            out[...] = unpack_bits(stored[column])
        else:
            decoder.weights(stored[column], encoding["value"], out)
    return row
