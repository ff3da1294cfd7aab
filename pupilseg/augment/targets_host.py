"""Targets of one label on the CPU, like `pupilseg.maps`, without allocating memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pupilseg import maps
from pupilseg.geometry import HEIGHT, WIDTH, ellipse_vector

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TargetMaker:
    """Writes targets into given arrays. Holds scratch memory: use one object per thread."""

    def __init__(self) -> None:
        self._squared = np.empty((HEIGHT, WIDTH), np.float32)
        self._scaled = np.empty((HEIGHT, WIDTH), np.float64)
        self._mask = np.empty((HEIGHT, WIDTH), np.uint8)

    def write(self, label: NDArray[np.bool_], new: dict[str, NDArray[Any]]) -> None:
        """Writes the label, and the spatial_weights, dist_map and ellipse if present in `new`.

        Args:
            label: bool (400, 640).
            new: column -> array, filled with exactly the values that `maps` and `geometry` give.
        """
        np.copyto(new["label"], label)
        np.copyto(self._mask, label)
        if "ellipse" in new:
            new["ellipse"][...] = ellipse_vector(self._mask)
        if "spatial_weights" in new:
            maps.spatial_weights(self._mask, new["spatial_weights"])
        if "dist_map" in new:
            self._write_maps(self._mask, new["dist_map"])

    def _write_maps(self, mask: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Writes both distance maps, float32 (2, 400, 640)."""
        maps.write_squared_distance(mask, self._squared)
        maps.write_signed_distances(self._squared, self._scaled, out)
        rows, columns = maps.pupil_box(mask, margin=0)
        maps.swap_in_pupil(out[:, rows, columns], mask[rows, columns] != 0)
