"""Postprocessing: finds the pupil in a mask, fits a subpixel ellipse, and rates its confidence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from pupilseg.geometry import (
    HEIGHT,
    WIDTH,
    Ellipse,
    ellipse_from_weights,
    ellipse_mask,
    semi_axes,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.letterbox import Letterbox

MIN_AREA_PX = 60
"""Minimum area of a pupil in network pixels: a disk with a radius of 4.4 px."""
MIN_ASPECT = 0.15
"""Minimum axis ratio b / a of a pupil. A round pupil seen from 75 degrees off axis has 0.26."""
MIN_FILL = 0.75
"""Minimum ratio of a pupil's area to the area of the ellipse with the same second moments.

Half a disk has a ratio of 0.95. In the labels of 1,318 rendered and 100 OpenEDS pupils, the minimum
fill is 0.96 and the minimum aspect 0.22, so none is rejected."""


class Blob(NamedTuple):
    """A connected component of a mask that may be the pupil.

    Attributes:
        mask: uint8 (400, 640) of {0, 1}, without the other components.
        area_px: number of pixels.
        fill: ratio of its area to that of the ellipse with the same second moments, at most 1.
        rows: rows of the bounding box.
        columns: columns of the bounding box.
    """

    mask: NDArray[np.uint8]
    area_px: int
    fill: float
    rows: slice
    columns: slice


def find_blob(mask: NDArray[np.bool_], box: Letterbox) -> Blob | None:
    """Returns the largest connected component that may be the pupil, or None.

    A component is rejected if it is smaller than `MIN_AREA_PX`, narrower than `MIN_ASPECT`, fills
    less than `MIN_FILL` of its ellipse (rings, borders, L-shapes), or contains a corner of the
    frame (the dark border of an image).

    Args:
        mask: bool (400, 640), in network pixels.
        box: position of the frame in the mask; everything outside is ignored.
    """
    rows, columns = box.content
    # Search only the bounding box of the set pixels: most masks contain nothing but a pupil.
    left, top, wide, high = cv2.boundingRect(mask[box.content].view(np.uint8))
    left, top = left + columns.start, top + rows.start
    shown = mask[top : top + high, left : left + wide].view(np.uint8)
    if not shown.size:
        return None
    # 400 x 640 pixels hold at most 64,000 components; 16-bit labels take a third of the
    # time of 32-bit ones.
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        shown, connectivity=8, ltype=cv2.CV_16U
    )
    corners = {
        int(labels[y - top, x - left])
        for y in (rows.start, rows.stop - 1)
        for x in (columns.start, columns.stop - 1)
        if top <= y < top + high and left <= x < left + wide
    }
    areas = stats[:, cv2.CC_STAT_AREA]
    for number in sorted(range(1, count), key=lambda n: (-int(areas[n]), n)):
        area = int(areas[number])
        if area < MIN_AREA_PX:
            break
        if number in corners:
            continue
        x, y, width, height = (int(v) for v in stats[number, :4])
        part = labels[y : y + height, x : x + width] == number
        # 10 us; `geometry.ellipse_from_mask` takes 100 us.
        moments = cv2.moments(part.view(np.uint8), binaryImage=True)
        a, b = semi_axes(*(moments[name] / area for name in ("mu20", "mu02", "mu11")))
        if b < MIN_ASPECT * a or area < MIN_FILL * math.pi * a * b:
            continue
        blob = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        x, y = x + left, y + top
        rows, columns = slice(y, y + height), slice(x, x + width)
        blob[rows, columns] = part
        fill = min(1.0, area / (math.pi * a * b))
        return Blob(blob, area, fill, rows, columns)
    return None


def translated(ellipse: Ellipse, x: int, y: int) -> Ellipse:
    """Returns an ellipse moved by (x, y) pixels."""
    return ellipse._replace(
        center_x_px=ellipse.center_x_px + x, center_y_px=ellipse.center_y_px + y
    )


def margin_near(logits: NDArray[np.float32], blob: Blob) -> NDArray[np.float32]:
    """Returns the difference of the logits in a window around a blob, and 0 elsewhere.

    The difference of the whole frame would be 1 MB to write and read; a pupil covers a twentieth of
    it.

    Args:
        logits: float32 (2, 400, 640).
        blob: a component of `logits[1] > logits[0]`.

    Returns:
        float32 (400, 640).
    """
    window = tuple(
        slice(max(part.start - 3, 0), part.stop + 3) for part in (blob.rows, blob.columns)
    )
    margin = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    margin[window] = logits[1][window] - logits[0][window]
    return margin


def sub_pixel_ellipse(blob: Blob, margin: NDArray[np.float32], box: Letterbox) -> Ellipse:
    """Returns the ellipse with the second moments of the region where the margin is positive.

    Each pixel is weighted by the fraction of it that lies inside. For a pixel on the border this is
    estimated as 0.5 plus its margin divided by the largest difference to a neighbor
    (docs/benchmarks.md compares other estimates).

    Args:
        blob: a component of `margin > 0`.
        margin: float32 (400, 640), difference of the logits.
        box: position of the frame; everything outside is ignored.
    """
    rows, columns = (
        slice(max(part.start - 1, shown.start), min(part.stop + 1, shown.stop))
        for part, shown in zip((blob.rows, blob.columns), box.content, strict=True)
    )
    region = cv2.dilate(blob.mask[rows, columns], np.ones((3, 3), dtype=np.uint8))
    wide = np.asarray(cv2.copyMakeBorder(margin[rows, columns], 1, 1, 1, 1, cv2.BORDER_REPLICATE))
    along_y, along_x = np.abs(np.diff(wide[:, 1:-1], axis=0)), np.abs(np.diff(wide[1:-1], axis=1))
    step = np.maximum(
        np.maximum(along_y[:-1], along_y[1:]), np.maximum(along_x[:, :-1], along_x[:, 1:])
    )
    share = np.clip(0.5 + wide[1:-1, 1:-1] / np.maximum(step, np.float32(1e-6)), 0, 1) * region
    found = ellipse_from_weights(share)
    assert found is not None  # every pixel of the blob has a weight of at least 0.5
    return translated(found, columns.start, rows.start)


def blob_confidence(
    blob: Blob, margin: NDArray[np.float32], mask: NDArray[np.bool_], box: Letterbox
) -> float:
    """Returns the raw confidence of a segmentation, in [0, 1].

    It is the product of the mean probability inside the blob (sigmoid of the margin), `Blob.fill`,
    and the blob's share of all pixels that the network classified as pupil.
    """
    window = blob.rows, blob.columns
    inside = margin[window][blob.mask[window] != 0].astype(np.float64)
    probability = float((1 / (1 + np.exp(-inside))).mean())
    total = int(np.count_nonzero(mask[box.content]))
    return probability * blob.fill * blob.area_px / total


def ellipse_confidence(ellipse: Ellipse, image: NDArray[np.uint8], box: Letterbox) -> float:
    """Returns the raw confidence of an ellipse network, in [0, 1].

    The network outputs no probability, so the score is computed from the image: max(0, 2 p - 1),
    where p is the fraction of pixels in the ring from 1.2 to 1.6 semi-axes that are brighter than
    the median inside the ellipse. It is near 1 for a pupil and near 0 at an arbitrary position.

    Args:
        ellipse: in network pixels.
        image: uint8 (400, 640), the network's input.
        box: position of the frame in the image.
    """

    def scaled(factor: float) -> NDArray[np.uint8]:
        a, b = ellipse.semi_axis_a_px * factor, ellipse.semi_axis_b_px * factor
        mask = draw_ellipse(ellipse._replace(semi_axis_a_px=a, semi_axis_b_px=b), (HEIGHT, WIDTH))
        return mask[box.content]

    shown = image[box.content]
    inside = shown[scaled(1.0) != 0]
    ring = shown[(scaled(1.6) != 0) & (scaled(1.2) == 0)]
    if not inside.size or not ring.size:
        return 0.0
    return max(0.0, 2 * float((ring > np.median(inside)).mean()) - 1)


def draw_ellipse(ellipse: Ellipse, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Returns the mask of `geometry.ellipse_mask`, computed in the ellipse's bounding box only."""
    a, b, angle = ellipse.semi_axis_a_px, ellipse.semi_axis_b_px, ellipse.angle_rad
    reach_x = math.hypot(a * math.cos(angle), b * math.sin(angle)) + 1
    reach_y = math.hypot(a * math.sin(angle), b * math.cos(angle)) + 1
    left = min(max(0, math.floor(ellipse.center_x_px - reach_x)), shape[1])
    top = min(max(0, math.floor(ellipse.center_y_px - reach_y)), shape[0])
    right = max(left, min(shape[1], math.ceil(ellipse.center_x_px + reach_x) + 1))
    bottom = max(top, min(shape[0], math.ceil(ellipse.center_y_px + reach_y) + 1))
    mask = np.zeros(shape, dtype=np.uint8)
    local = translated(ellipse, -left, -top)
    mask[top:bottom, left:right] = ellipse_mask(local, (bottom - top, right - left))
    return mask
