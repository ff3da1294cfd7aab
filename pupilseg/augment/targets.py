"""The targets of one label on the CPU: those of `pupilseg.maps`, for a pupil small in its frame.

`maps` takes 8 ms a frame, this 3: edges and the distances inside the pupil depend on the pupil's
bounding box alone, and nothing is allocated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pupilseg import maps
from pupilseg.geometry import HEIGHT, WIDTH, ellipse_vector
from pupilseg.shards.codec import distance_tables

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TargetMaker:
    """Writes targets into given arrays; keeps its scratch, so one object serves one thread.

    Attributes:
        level: float32 (400, 640), scratch that a caller may form the label in.
    """

    def __init__(self) -> None:
        self.level = np.empty((HEIGHT, WIDTH), np.float32)
        self._distance = np.empty((HEIGHT, WIDTH), np.float32)
        self._squared = np.empty((HEIGHT, WIDTH), np.intp)
        self._mask = np.empty((HEIGHT, WIDTH), np.uint8)

    def write(self, label: NDArray[np.bool_], new: dict[str, NDArray[Any]]) -> None:
        """Writes label, spatial_weights, dist_map and ellipse, those that are in `new`.

        Args:
            label: bool (400, 640).
            new: column -> array; weights and maps get the bits that `maps` gives them.
        """
        np.copyto(new["label"], label)
        mask = self._mask
        np.copyto(mask, label)
        left, top, width, height = cv2.boundingRect(mask)
        if "ellipse" in new:
            new["ellipse"][...] = _ellipse(mask, left, top, width, height)
        if "spatial_weights" in new:
            new["spatial_weights"].fill(0)
            # Sobel's gradient reaches one pixel beyond the pupil, the dilation one more.
            near = _box(left, top, width, height, margin=2)
            if width:
                edges = cv2.Canny(mask[near] * 255, *maps.CANNY_THRESHOLDS)
                band = cv2.dilate(edges, maps.DILATION_KERNEL) > 0
                np.multiply(band, maps.EDGE_WEIGHT, out=new["spatial_weights"][near])
        if "dist_map" in new:
            self._write_maps(mask, _box(left, top, width, height, margin=1), new["dist_map"])

    def _write_maps(
        self, mask: NDArray[np.uint8], near: tuple[slice, slice], out: NDArray[np.float32]
    ) -> None:
        """Writes both distance maps.

        Args:
            mask: (400, 640) of {0, 1}; overwritten.
            near: the pupil's bounding box and one pixel around it, where the frame has one.
            out: float32 (2, 400, 640).
        """
        outside, inside = distance_tables()
        inner = mask[near].copy()
        if inner.size in (0, mask.size) and inner.all():  # a class is absent
            pupil = int(inner.size > 0)
            out[pupil] = inside[maps.MAX_DISTANCE_SQUARED]
            out[1 - pupil] = outside[maps.MAX_DISTANCE_SQUARED]
            return
        distance, squared = self._distance, self._squared
        np.subtract(1, mask, out=mask)
        cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE, dst=distance)
        # The background nearest to a pixel of the pupil is never beyond the ring around the box:
        # moved onto the ring along one axis or both, it would be nearer.
        distance[near] += cv2.distanceTransform(inner, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # As in maps.squared_distance; squaring in float32 adds 0.04 to its error of 0.14.
        np.multiply(distance, distance, out=distance)
        np.rint(distance, out=distance)
        np.copyto(squared, distance, casting="unsafe")
        # No square is beyond the table; `wrap` is the quickest mode that writes into `out`.
        np.take(outside, squared, out=out[1], mode="wrap")
        np.take(inside, squared, out=out[0], mode="wrap")
        pupil_inside = out[0][near].copy()
        np.copyto(out[0][near], out[1][near], where=inner != 0)
        np.copyto(out[1][near], pupil_inside, where=inner != 0)


def _box(left: int, top: int, width: int, height: int, margin: int) -> tuple[slice, slice]:
    """Returns rows and columns of a box with a margin, within the frame; none of an empty one."""
    if width == 0:
        return np.s_[0:0, 0:0]
    return (
        slice(max(top - margin, 0), min(top + height + margin, HEIGHT)),
        slice(max(left - margin, 0), min(left + width + margin, WIDTH)),
    )


def _ellipse(
    mask: NDArray[np.uint8], left: int, top: int, width: int, height: int
) -> NDArray[np.float32]:
    """Returns `geometry.ellipse_vector` of a mask from its bounding box alone."""
    vector = ellipse_vector(mask[top : top + height, left : left + width])
    if width:
        vector[:2] += np.array([left / WIDTH, top / HEIGHT], np.float32)
    return vector
