"""Scores frames and splits from masks, with NumPy and without torch.

The masks are those of the network, before the postprocessing of `predict`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pupilseg.geometry import (
    ELLIPSE_SCALE,
    HEIGHT,
    WIDTH,
    ellipse_vector,
)
from pupilseg.model_files.calibration import GOOD_PX

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class FrameScores:
    """Counts and errors of n frames, in the order of the split.

    Attributes:
        names: names of the frames.
        area_px: int64 (n,), number of pixels in the label.
        predicted_area_px: int64 (n,), number of pixels in the prediction.
        intersection_px: int64 (n,), number of pixels in both.
        center_error_px: float64 (n,), distance between the centroids; NaN if either mask is empty.
        radius_error_px: float64 (n,), mean absolute difference of the semi-axes along x and y of
            the upright ellipses with the masks' second moments; NaN if either mask is empty.
    """

    names: list[str]
    area_px: NDArray[np.int64]
    predicted_area_px: NDArray[np.int64]
    intersection_px: NDArray[np.int64]
    center_error_px: NDArray[np.float64]
    radius_error_px: NDArray[np.float64]

    @property
    def is_blink(self) -> NDArray[np.bool_]:
        """Bool (n,): the label has no pupil."""
        return self.area_px == 0

    @property
    def found(self) -> NDArray[np.bool_]:
        """Bool (n,): label and prediction both have a pupil."""
        return (self.area_px > 0) & (self.predicted_area_px > 0)

    @property
    def union_px(self) -> NDArray[np.int64]:
        """int64 (n,)."""
        return self.area_px + self.predicted_area_px - self.intersection_px

    @property
    def pupil_iou(self) -> NDArray[np.float64]:
        """float64 (n,); for a blink, 1 if nothing is predicted, else 0."""
        return _ratio(self.intersection_px, self.union_px)

    @property
    def background_iou(self) -> NDArray[np.float64]:
        """float64 (n,)."""
        pixels = HEIGHT * WIDTH
        return _ratio(pixels - self.union_px, pixels - self.intersection_px)


def _ratio(numerator: Any, denominator: Any) -> NDArray[np.float64]:
    """Returns quotients of counts; 0 / 0 counts as 1, as in `train.metrics.scores`."""
    above = np.atleast_1d(numerator).astype(float)
    below = np.atleast_1d(denominator).astype(float)
    return np.divide(above, below, out=np.ones_like(above), where=below > 0)


def centroid(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Returns the mean column and row of the set pixels, float64 (2,); NaN for an empty mask."""
    rows, columns = mask.sum(axis=1, dtype=np.float64), mask.sum(axis=0, dtype=np.float64)
    area = rows.sum()
    if not area:
        return np.full(2, np.nan)
    return np.array([columns @ np.arange(len(columns)), rows @ np.arange(len(rows))]) / area


def radius_error_px(truth: NDArray[np.bool_], found: NDArray[np.bool_]) -> float:
    """Returns `FrameScores.radius_error_px` of two masks."""
    if not (truth.any() and found.any()):
        return float("nan")
    difference = (ellipse_vector(truth) - ellipse_vector(found)) * ELLIPSE_SCALE
    return float(np.abs(difference[2:]).mean())


def score_frames(names: list[str], pairs: Iterable[tuple[Any, Any]]) -> FrameScores:
    """Compares labels and predictions.

    Args:
        names: names of the frames.
        pairs: (label, predicted mask) of each frame, (400, 640), non-zero inside the pupil.
    """
    areas = np.zeros((len(names), 3), dtype=np.int64)
    errors = np.full((len(names), 2), np.nan)
    for i, (label, mask) in enumerate(pairs):
        truth, found = np.asarray(label) != 0, np.asarray(mask) != 0
        areas[i] = [np.count_nonzero(m) for m in (truth, found, truth & found)]
        errors[i, 0] = np.hypot(*(centroid(truth) - centroid(found)))
        errors[i, 1] = radius_error_px(truth, found)
    return FrameScores(names, *areas.T, *errors.T)


def summarize(scores: FrameScores) -> dict[str, float]:
    """Returns the scores of a split.

    Returns:
        miou, pupil_iou, background_iou: from counts summed over all frames, as in training.
        pupil_iou_mean, _median, _p5: over the frames with a pupil. center_error_px_mean, _median,
        _p95 and radius_error_px_mean, ...: over the frames in which a pupil was found.
        within_5px_share, found_share: fractions of the frames with a pupil. frames, blinks,
        blink_false_positives (blinks with a prediction): counts. A score that no frame contributes
        to is NaN.
    """
    union, inter = scores.union_px.sum(), scores.intersection_px.sum()
    pixels = len(scores.names) * HEIGHT * WIDTH
    pupil, background = _ratio(inter, union)[0], _ratio(pixels - union, pixels - inter)[0]
    open_eye = ~scores.is_blink
    iou, errors = scores.pupil_iou[open_eye], scores.center_error_px[scores.found]
    radius = scores.radius_error_px[scores.found]
    within = share_within(scores.center_error_px[open_eye], np.array([GOOD_PX]))[0]
    return {
        "miou": float(pupil + background) / 2,
        "pupil_iou": float(pupil),
        "background_iou": float(background),
        "pupil_iou_mean": _mean(iou),
        "pupil_iou_median": _quantile(iou, 0.5),
        "pupil_iou_p5": _quantile(iou, 0.05),
        "center_error_px_mean": _mean(errors),
        "center_error_px_median": _quantile(errors, 0.5),
        "center_error_px_p95": _quantile(errors, 0.95),
        "radius_error_px_mean": _mean(radius),
        "radius_error_px_median": _quantile(radius, 0.5),
        "radius_error_px_p95": _quantile(radius, 0.95),
        "within_5px_share": float(within),
        "found_share": _mean(scores.found[open_eye].astype(float)),
        "frames": len(scores.names),
        "blinks": int(scores.is_blink.sum()),
        "blink_false_positives": int((scores.is_blink & (scores.predicted_area_px > 0)).sum()),
    }


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _quantile(values: NDArray[np.float64], share: float) -> float:
    return float(np.quantile(values, share)) if values.size else float("nan")


def share_within(
    center_error_px: NDArray[np.float64], distance_px: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Returns the fraction of errors that are at most each distance.

    A NaN error exceeds every distance. The result is NaN if there are no errors.
    """
    if not center_error_px.size:
        return np.full(len(distance_px), np.nan)
    found = np.sort(center_error_px[~np.isnan(center_error_px)])
    share: NDArray[np.float64] = np.searchsorted(found, distance_px, "right") / center_error_px.size
    return share
