"""Boundary weights and signed distance maps of a pupil label, exact to the last bit.

One integer determines both distance maps: let u(p) be the Euclidean distance from pixel p to the
nearest pixel of the other class. Then u^2 is an integer, and each class map is +u or -(u - 1),
divided by the image diagonal. `docs/differences.md` lists where earlier systems differ, and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, NUM_CLASSES, WIDTH

if TYPE_CHECKING:
    from numpy.typing import NDArray

EDGE_WEIGHT = np.float32(20.0)
"""Extra cross-entropy weight on the pupil boundary (RITnet `dataset.py`: 20 * edge)."""
CANNY_THRESHOLDS = (0, 3)
DILATION_KERNEL = np.ones((2, 1), dtype=np.uint8)
"""The kernel that `cv2.dilate(x, (3, 3))` actually uses: the tuple is read as a column of ones."""
MAX_DISTANCE_SQUARED = (HEIGHT - 1) ** 2 + (WIDTH - 1) ** 2
"""Largest u^2 in a frame, 567,522; also u^2 of every pixel if the other class is absent."""
DIAGONAL = float(np.hypot(HEIGHT - 1, WIDTH - 1))
"""Distance between opposite corner pixels, 753.34 px: the unit of `dist_map`."""


def check_label(label: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Returns the label as contiguous uint8.

    Args:
        label: (400, 640) of {0, 1}, integer or bool.

    Raises:
        ValueError: wrong shape, dtype or value; the message names it.
    """
    if label.shape != (HEIGHT, WIDTH):
        raise ValueError(f"label has shape {label.shape}, expected ({HEIGHT}, {WIDTH})")
    if label.dtype.kind not in "bui":
        raise ValueError(f"label has dtype {label.dtype}, expected uint8 of {{0, 1}}")
    lowest, highest = int(label.min()), int(label.max())
    if lowest < 0 or highest >= NUM_CLASSES:
        raise ValueError(f"label has values {lowest}..{highest}, expected {{0, 1}}")
    return np.ascontiguousarray(label, dtype=np.uint8)


def pupil_box(label: NDArray[np.uint8], margin: int) -> tuple[slice, slice]:
    """Returns rows and columns of the pupil's bounding box, extended by `margin` within the frame.

    Args:
        label: uint8 (400, 640), non-zero is pupil.
        margin: pixels added on each side.

    Returns:
        Two slices, empty if there is no pupil.
    """
    left, top, width, height = cv2.boundingRect(label)
    if width == 0:
        return slice(0, 0), slice(0, 0)
    return (
        slice(max(top - margin, 0), min(top + height + margin, HEIGHT)),
        slice(max(left - margin, 0), min(left + width + margin, WIDTH)),
    )


def spatial_weights(
    label: NDArray[np.generic], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Returns the extra cross-entropy weight near the pupil boundary.

    This is 20 times the Canny edge (thresholds 0, 3) of `255 * label`, dilated as in revision B of
    the data set, so that a raw folder and the Hub give the same values to the bit.

    Args:
        label: (400, 640) of {0, 1}.
        out: float32 (400, 640) to write to; a new array by default.

    Returns:
        float32 (400, 640) of {0, 20}; all zero for a frame without a pupil.
    """
    label = check_label(label)
    out = np.empty(label.shape, np.float32) if out is None else out
    out.fill(0)
    # Sobel's gradient reaches one pixel beyond the pupil, the dilation one more.
    window = pupil_box(label, margin=2)
    if label[window].size:
        edges = cv2.Canny(label[window] * 255, *CANNY_THRESHOLDS)
        band = cv2.dilate(edges, DILATION_KERNEL)
        np.multiply(band > 0, EDGE_WEIGHT, out=out[window])
    return out


def squared_distance(label: NDArray[np.generic]) -> NDArray[np.int32]:
    """Returns u^2: the exact squared Euclidean distance of each pixel to the other class.

    If a class is absent, the distance is undefined and every pixel gets `MAX_DISTANCE_SQUARED`. The
    maps of a blink are therefore finite, with the largest distance to a pupil everywhere.

    Args:
        label: (400, 640) of {0, 1}.

    Returns:
        int32 (400, 640), 1 .. 567,522.
    """
    label = check_label(label)
    out = np.empty(label.shape, np.float32)
    write_squared_distance(label, out)
    return out.astype(np.int32)


def write_squared_distance(label: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Writes u^2, as returned by `squared_distance`, as float32.

    OpenCV's precise transform computes in float32, but rounding its square gives the exact integer.
    For u <= 753.4 px, a relative error of 2^-23 changes u^2 by at most 0.14, and squaring in
    float32 adds at most 0.04 (tested against SciPy in float64).

    Args:
        label: uint8 (400, 640) of {0, 1}, contiguous.
        out: float32 (400, 640).
    """
    window = pupil_box(label, margin=1)
    inner = np.ascontiguousarray(label[window])
    if inner.size == 0 or (inner.size == label.size and inner.all()):
        out.fill(MAX_DISTANCE_SQUARED)
        return
    ipp = cv2.ipp.useIPP()  # a setting of this thread
    cv2.ipp.setUseIPP(False)  # IPP takes 2.3 ms, OpenCV's own code 1.9 (AMD EPYC, one thread)
    cv2.distanceTransform(1 - label, cv2.DIST_L2, cv2.DIST_MASK_PRECISE, dst=out)
    # Each transform is zero on the other class, so their sum is u everywhere. The background pixel
    # nearest to a pupil pixel is inside the box or on the one-pixel ring around it: a pixel farther
    # out would be closer if it were moved onto the ring.
    out[window] += cv2.distanceTransform(inner, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    cv2.ipp.setUseIPP(ipp)
    np.multiply(out, out, out=out)
    np.rint(out, out=out)


def write_squared_from_maps(dist_map: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Recovers u^2 from distance maps that follow the definition in this module.

    The positive one of a pixel's two distances is u / diagonal, rounded to float32. Its scaled
    square is within 0.1 of the integer, so rounding recovers it. Maps with another definition give
    other numbers; to detect them, compare the result of `maps_from_squared` with the maps.

    Args:
        dist_map: float32 (2, 400, 640).
        out: float32 (400, 640).
    """
    np.maximum(dist_map[0], dist_map[1], out=out)
    np.multiply(out, DIAGONAL, out=out)
    with np.errstate(over="ignore", invalid="ignore"):  # maps with another definition
        np.multiply(out, out, out=out)
    np.rint(out, out=out)


def signed_tables() -> NDArray[np.float32]:
    """Returns the normalized signed distances for every possible u^2, outside and inside a class.

    float32 (2, 567523): row 0 is u / diagonal (outside the class), row 1 is -(u - 1) / diagonal
    (inside). Computed in float64 and rounded once; float32 arithmetic gives other values.
    """
    u = np.sqrt(np.arange(MAX_DISTANCE_SQUARED + 1, dtype=np.float64))
    return np.stack([u / DIAGONAL, (1 - u) / DIAGONAL]).astype(np.float32)


def write_signed_distances(
    squared: NDArray[np.float32], scaled: NDArray[np.float64], out: NDArray[np.float32]
) -> None:
    """Writes both maps as if the label were 0 everywhere: inside class 0, outside class 1.

    Computed in float64 and rounded once, which is faster than looking values up
    (docs/benchmarks.md). The result equals `signed_tables` for each of the 567,523 possible u^2
    (tests/shards/test_codec.py).

    Args:
        squared: float32 (400, 640) of integers.
        scaled: float64 (400, 640), scratch.
        out: float32 (2, 400, 640).
    """
    np.copyto(scaled, squared)
    cv2.sqrt(scaled, dst=scaled)  # half the time of NumPy's
    np.multiply(scaled, 1 / DIAGONAL, out=scaled)
    np.copyto(out[1], scaled, casting="same_kind")
    np.subtract(1 / DIAGONAL, scaled, out=scaled)
    np.copyto(out[0], scaled, casting="same_kind")


def swap_in_pupil(window: NDArray[np.float32], pupil: NDArray[np.bool_]) -> None:
    """Swaps the two maps where the label is 1, in place.

    Args:
        window: float32 (2, h, w), the part of the maps around the pupil.
        pupil: bool (h, w), the label there.
    """
    second = window[1].copy()
    np.copyto(window[1], window[0], where=pupil)
    np.copyto(window[0], second, where=pupil)


def maps_from_squared(
    squared: NDArray[np.integer], label: NDArray[np.generic]
) -> NDArray[np.float32]:
    """Returns both signed distance maps from u^2 and the label.

    Args:
        squared: (400, 640) integers from `squared_distance`.
        label: (400, 640) of {0, 1}, the label that they belong to.

    Returns:
        float32 (2, 400, 640): for each class, distance / diagonal outside, -(distance - 1) /
        diagonal inside.
    """
    u = np.sqrt(squared.astype(np.float64))
    # 1 - u, because -(u - 1) gives -0.0 on the border, where revision B of the data set has +0.0.
    outside, inside = u / DIAGONAL, (1 - u) / DIAGONAL
    is_pupil = np.asarray(label) != 0
    both = np.stack([np.where(is_pupil, outside, inside), np.where(is_pupil, inside, outside)])
    return both.astype(np.float32)


def distance_maps(label: NDArray[np.generic]) -> NDArray[np.float32]:
    """Returns the signed Euclidean distance to each class, for the surface loss.

    Kervadec et al., Boundary loss, MIDL 2019, eq. 5, with the one-pixel inner offset of RITnet
    (`utils.py: one_hot2dist`).

    Args:
        label: (400, 640) of {0, 1}.

    Returns:
        float32 (2, 400, 640), class 0 first; positive outside the class. A frame without a pupil
        has +1 everywhere for class 1 and -(diagonal - 1) / diagonal for class 0.
    """
    return maps_from_squared(squared_distance(label), label)
