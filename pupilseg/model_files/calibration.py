"""Platt scaling: maps a raw score to the probability that a pupil's center is within 5 px.

`p = c * sigmoid(slope * logit(raw) + intercept)` is fitted on n validation frames in which a pupil
was found (Platt, "Probabilistic outputs for support vector machines", 1999). The factor
c = (n + 1) / (n + 2) limits the probability to what n successes can support (Laplace's rule of
succession). Unlike isotonic regression, a map with two parameters does not overfit a few hundred
frames, and it preserves the order of the scores.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

GOOD_PX = 5.0
"""Largest center error in px that counts as a success, the usual value in the literature."""
MIN_SLOPE = 0.05
"""Lower bound of the slope, which keeps the map increasing even if the score is uninformative."""
BINS = 10
"""Number of groups in a reliability diagram, each with the same number of frames."""
_CLIP = 1e-3
"""Minimum distance of raw scores from 0 and 1, where the logit is infinite."""
_STEPS = 60


@dataclass(frozen=True, slots=True)
class Calibration:
    """A fitted map from a raw score to a probability.

    Attributes:
        slope: factor of the logit, positive.
        intercept: offset of the scaled logit.
        frames: number of frames that it was fitted on.
        data: source of these frames.
    """

    slope: float
    intercept: float
    frames: int
    data: str

    def __call__(self, raw: float) -> float:
        """Returns the probability for a raw score in [0, 1]."""
        upper_bound = (self.frames + 1) / (self.frames + 2)
        return upper_bound / (1 + math.exp(-float(self.slope * _logit(raw) + self.intercept)))

    def to_json(self) -> str:
        """Returns the text stored in an ONNX file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses the output of `to_json`.

        Raises:
            ValueError: the text is not a valid calibration.
        """
        stored = json.loads(text)
        try:
            found = cls(
                float(stored["slope"]),
                float(stored["intercept"]),
                int(stored["frames"]),
                str(stored["data"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"calibration {text!r} lacks a value") from error
        if not (found.slope > 0 and math.isfinite(found.slope + found.intercept)):
            raise ValueError(f"calibration {text!r} is not an increasing map")
        return found


def _logit(raw: ArrayLike) -> NDArray[np.float64]:
    """Returns log(p / (1 - p)) of scores clipped to [_CLIP, 1 - _CLIP]."""
    clipped = np.clip(np.asarray(raw, dtype=np.float64), _CLIP, 1 - _CLIP)
    return np.log(clipped / (1 - clipped))


def fit_calibration(
    raw: NDArray[np.float64], good: NDArray[np.bool_], data: str = ""
) -> Calibration:
    """Fits the map by maximum likelihood.

    Two pseudo-observations, a failure at a raw score of 0.5 and a success at 0.95, keep the map
    finite and increasing if all frames are good or all are bad. Their weight is negligible among
    hundreds of frames.

    Args:
        raw: float64 (n,), scores of the frames in which a pupil was found; n may be 0.
        good: bool (n,), True if the center was within `GOOD_PX`.
        data: source of the frames.
    """
    x = np.append(_logit(raw), _logit([0.5, 0.95]))
    y = np.append(good, [False, True]).astype(np.float64)
    parameters = np.array([1.0, 0.0])
    design = np.stack([x, np.ones_like(x)], axis=1)
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-(design @ parameters)))
        # A ridge penalty of 1e-3 toward the identity, for perfectly separable frames.
        gradient = design.T @ (p - y) + 1e-3 * (parameters - [1.0, 0.0])
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-3 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        parameters -= step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    slope, intercept = (float(value) for value in parameters)
    if slope < MIN_SLOPE:
        slope, intercept = MIN_SLOPE, _intercept(MIN_SLOPE * x, float(y.sum()))
    return Calibration(round(slope, 6), round(intercept, 6), len(raw), data)


def _intercept(logits: NDArray[np.float64], wanted: float) -> float:
    """Finds by bisection the offset of logits for which their probabilities have a given sum."""
    low, high = -30.0, 30.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-(logits + middle)))).sum() < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class Reliability(NamedTuple):
    """Reliability diagram: confidence and actual fraction of good frames, per group of frames.

    Attributes:
        confidence: float64 (k,), mean confidence of each group.
        share_good: float64 (k,), fraction with a center error of at most `GOOD_PX`.
        frames: int64 (k,), number of frames in each group.
    """

    confidence: NDArray[np.float64]
    share_good: NDArray[np.float64]
    frames: NDArray[np.int64]

    @property
    def error(self) -> float:
        """Expected calibration error: mean difference over the frames; NaN without frames."""
        if not self.frames.sum():
            return float("nan")
        gap = np.abs(self.confidence - self.share_good)
        return float((gap * self.frames).sum() / self.frames.sum())


def reliability(
    confidence: NDArray[np.float64], good: NDArray[np.bool_], bins: int = BINS
) -> Reliability:
    """Groups frames by confidence, with the same number of frames in each group.

    Args:
        confidence: float64 (n,).
        good: bool (n,), True if the center was within `GOOD_PX`.
        bins: maximum number of groups.
    """
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, max(1, len(order)))) if len(part)]
    return Reliability(
        np.array([confidence[part].mean() for part in parts]),
        np.array([good[part].mean() for part in parts]),
        np.array([len(part) for part in parts], dtype=np.int64),
    )


def cross_fitted(raw: NDArray[np.float64], good: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Returns the confidence of each frame from a map fitted on the other half of the frames."""
    even = np.arange(len(raw)) % 2 == 0
    found = np.empty(len(raw))
    for half in (even, ~even):
        calibration = fit_calibration(raw[~half], good[~half])
        found[half] = [calibration(score) for score in raw[half]]
    return found
