"""From a network's output to a pupil: the plausible blob, its ellipse, a raw confidence."""

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
"""Smallest blob taken for a pupil, in network pixels: a disc of 4.4 px radius."""
MIN_ASPECT = 0.15
"""Least semi-axis ratio b / a of a blob; a pupil seen from 75 degrees aside has 0.26."""
MIN_FILL = 0.75
"""Least share that a blob fills of the ellipse with its moments; half a disc fills 0.95 of it.

Measured on the labels of 1,318 rendered and 100 OpenEDS pupils: least fill 0.96, least aspect 0.22,
none refused."""


class Blob(NamedTuple):
    """A plausible pupil in a mask.

    Attributes:
        mask: uint8 (400, 640) of {0, 1}: this blob alone.
        area_px: set pixels.
        fill: area over that of the ellipse with the same second moments; 1 for a whole ellipse.
        rows: of its bounding box.
        columns: of its bounding box.
    """

    mask: NDArray[np.uint8]
    area_px: int
    fill: float
    rows: slice
    columns: slice


def find_blob(mask: NDArray[np.bool_], box: Letterbox) -> Blob | None:
    """Returns the largest blob that can be a pupil.

    Refused are blobs under `MIN_AREA_PX`, narrower than `MIN_ASPECT`, of a shape that fills less
    than `MIN_FILL` of its ellipse (rings, frames, L-shapes), or holding a corner of the frame (the
    dark border of an image).

    Args:
        mask: bool (400, 640), network pixels.
        box: where the frame lies in it; what is beside the frame is ignored.
    """
    rows, columns = box.content
    # Only where anything is set: most masks hold a pupil and nothing else.
    left, top, wide, high = cv2.boundingRect(mask[box.content].view(np.uint8))
    left, top = left + columns.start, top + rows.start
    shown = mask[top : top + high, left : left + wide].view(np.uint8)
    if not shown.size:
        return None
    # 16 bits hold the 64,000 blobs that 400 x 640 can have, and take a third of the time of 32.
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
        # Ten microseconds, where the ellipse in float64 NumPy takes a hundred.
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


def moved(ellipse: Ellipse, x: int, y: int) -> Ellipse:
    """Returns an ellipse of a window as one of the image that has the window at (x, y)."""
    return ellipse._replace(
        center_x_px=ellipse.center_x_px + x, center_y_px=ellipse.center_y_px + y
    )


def margin_near(logits: NDArray[np.float32], blob: Blob) -> NDArray[np.float32]:
    """Returns the logits' difference in and around a blob, 0 elsewhere.

    All of it would be 1 MB to write and to read again for a pupil that takes a twentieth.

    Args:
        logits: float32 (2, 400, 640).
        blob: of `logits[1] > logits[0]`.

    Returns:
        float32 (400, 640).
    """
    around = tuple(
        slice(max(part.start - 3, 0), part.stop + 3) for part in (blob.rows, blob.columns)
    )
    margin = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    margin[around] = logits[1][around] - logits[0][around]
    return margin


def sub_pixel_ellipse(blob: Blob, margin: NDArray[np.float32], box: Letterbox) -> Ellipse:
    """Returns the ellipse with the blob's second moments, its border where the margin is zero.

    A pixel at the border counts by the share of it that lies inside: half, and more or less by the
    margin over its largest step to a neighbour (docs/benchmarks.md compares other readings).

    Args:
        blob: of `margin > 0`.
        margin: float32 (400, 640), the logits' difference.
        box: where the frame lies; what is beside it does not count.
    """
    rows, columns = (
        slice(max(part.start - 1, shown.start), min(part.stop + 1, shown.stop))
        for part, shown in zip((blob.rows, blob.columns), box.content, strict=True)
    )
    near = cv2.dilate(blob.mask[rows, columns], np.ones((3, 3), dtype=np.uint8))
    wide = np.asarray(cv2.copyMakeBorder(margin[rows, columns], 1, 1, 1, 1, cv2.BORDER_REPLICATE))
    along_y, along_x = np.abs(np.diff(wide[:, 1:-1], axis=0)), np.abs(np.diff(wide[1:-1], axis=1))
    step = np.maximum(
        np.maximum(along_y[:-1], along_y[1:]), np.maximum(along_x[:, :-1], along_x[:, 1:])
    )
    share = np.clip(0.5 + wide[1:-1, 1:-1] / np.maximum(step, np.float32(1e-6)), 0, 1) * near
    found = ellipse_from_weights(share)
    assert found is not None  # every pixel of the blob counts for half or more
    return moved(found, columns.start, rows.start)


def blob_confidence(
    blob: Blob, margin: NDArray[np.float32], mask: NDArray[np.bool_], box: Letterbox
) -> float:
    """Returns how sure a segmentation is of its pupil, 0 .. 1.

    The product of the mean probability inside the blob (sigmoid of the logits' difference), the
    share of its ellipse that it fills, and its share of all pixels that the network calls pupil.
    """
    window = blob.rows, blob.columns
    inside = margin[window][blob.mask[window] != 0].astype(np.float64)
    probability = float((1 / (1 + np.exp(-inside))).mean())
    total = int(np.count_nonzero(mask[box.content]))
    return probability * blob.fill * blob.area_px / total


def ellipse_confidence(ellipse: Ellipse, image: NDArray[np.uint8], box: Letterbox) -> float:
    """Returns how much the image looks like a pupil at an ellipse, 0 .. 1.

    An ellipse network gives no probability, so this measures the frame: with p the share of pixels
    in the ring of 1.2 to 1.6 semi-axes that are brighter than the median inside, 2 p - 1, at
    least 0. A pupil has 1, an arbitrary place 0.

    Args:
        ellipse: in network pixels.
        image: uint8 (400, 640), what the network saw.
        box: where the frame lies in it.
    """

    def grown(factor: float) -> NDArray[np.uint8]:
        a, b = ellipse.semi_axis_a_px * factor, ellipse.semi_axis_b_px * factor
        mask = draw_ellipse(ellipse._replace(semi_axis_a_px=a, semi_axis_b_px=b), (HEIGHT, WIDTH))
        return mask[box.content]

    shown = image[box.content]
    inside = shown[grown(1.0) != 0]
    ring = shown[(grown(1.6) != 0) & (grown(1.2) == 0)]
    if not inside.size or not ring.size:
        return 0.0
    return max(0.0, 2 * float((ring > np.median(inside)).mean()) - 1)


def draw_ellipse(ellipse: Ellipse, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Returns what `geometry.ellipse_mask` does, computed within the ellipse's bounds only."""
    a, b, angle = ellipse.semi_axis_a_px, ellipse.semi_axis_b_px, ellipse.angle_rad
    reach_x = math.hypot(a * math.cos(angle), b * math.sin(angle)) + 1
    reach_y = math.hypot(a * math.sin(angle), b * math.cos(angle)) + 1
    left = min(max(0, math.floor(ellipse.center_x_px - reach_x)), shape[1])
    top = min(max(0, math.floor(ellipse.center_y_px - reach_y)), shape[0])
    right = max(left, min(shape[1], math.ceil(ellipse.center_x_px + reach_x) + 1))
    bottom = max(top, min(shape[0], math.ceil(ellipse.center_y_px + reach_y) + 1))
    mask = np.zeros(shape, dtype=np.uint8)
    local = moved(ellipse, -left, -top)
    mask[top:bottom, left:right] = ellipse_mask(local, (bottom - top, right - left))
    return mask
