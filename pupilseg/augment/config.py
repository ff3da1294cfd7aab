"""Strengths of the augmentation. Imports neither torch nor NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pupilseg.errors import UsageError

SHARES = ("flip", "scale", "shift", "streaks", "blur")
LARGEST_SIGMA = 2.0


def _strength(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """Strength of each part of the augmentation; 0 turns a part off.

    Each field's metadata holds its help text. A single random number decides both scale and shift,
    so with equal shares the same frames get both. This is faster: most of the cost is recomputing
    the targets, which every scaled or shifted frame needs.

    Raises:
        UsageError: a value is out of range.
    """

    flip: float = _strength(0.5, "share of frames mirrored left to right")
    scale: float = _strength(
        0.25, "share of frames scaled to a random pupil radius (blinks: by a random factor)"
    )
    radius_min: float = _strength(
        15.0, "smallest pupil radius after scaling, in px, log-uniform; mean of both semi-axes"
    )
    radius_max: float = _strength(65.0, "largest pupil radius after scaling, in px")
    shift: float = _strength(0.25, "share of frames shifted")
    reach: float = _strength(
        0.1, "largest shift as a fraction of width and height; the pupil's center stays in view"
    )
    streaks: float = _strength(0.15, "share of frames with bright streaks, as spectacles cause")
    blur: float = _strength(0.2, "share of frames blurred")
    blur_sigma: float = _strength(
        LARGEST_SIGMA, f"largest sigma of the Gaussian blur, in px, at most {LARGEST_SIGMA:g}"
    )
    gamma: float = _strength(0.2, "exponent exp(U(-gamma, gamma)) on the image in [0, 1]")
    gain: float = _strength(0.3, "brightness factor exp(U(-gain, gain))")
    offset: float = _strength(0.1, "added brightness U(-offset, offset), image in [-1, 1]")
    noise: float = _strength(
        0.05,
        "largest standard deviation of Gaussian noise on white, image in [-1, 1]; falls linearly "
        "to half of it on black, like the shot noise and read noise of a sensor",
    )

    def __post_init__(self) -> None:
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"augment: {name} = {getattr(self, name)}, expected 0 to 1")
        if not 0 < self.radius_min <= self.radius_max:
            raise UsageError(
                f"augment: radii from {self.radius_min} to {self.radius_max} px, expected "
                "0 < radius_min <= radius_max; to leave pupil sizes unchanged, set scale = 0"
            )
        if not 0 <= self.blur_sigma <= LARGEST_SIGMA:
            raise UsageError(
                f"augment: blur_sigma = {self.blur_sigma} px, expected 0 to {LARGEST_SIGMA}"
            )
