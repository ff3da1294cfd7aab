"""How strongly to augment."""

from __future__ import annotations

from dataclasses import dataclass

from pupilseg.errors import UsageError

SHARES = ("flip", "scale", "shift", "streaks", "blur")
LARGEST_SIGMA = 2.0


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """How strongly to augment; 0 switches a part off.

    One random number decides of scale and shift, so that with equal shares the same frames get
    both: a frame that moves at all needs new targets, which is most of the cost.

    Raises:
        UsageError: a value that makes no sense; the message names it.

    Attributes:
        flip: share of frames mirrored left to right.
        scale: share of frames scaled to a drawn pupil radius (blinks: by a drawn factor).
        radius_min: least drawn radius, px, the mean of both semi-axes; drawn log-uniformly.
        radius_max: largest drawn radius, px.
        shift: share of frames shifted.
        reach: largest shift, as a part of width and of height; the pupil's centre stays in view.
        streaks: share of frames with bright streaks, as spectacles show.
        blur: share of frames blurred.
        blur_sigma: largest standard deviation of the Gaussian blur, px, up to 2.
        gamma: exponent exp(U(-gamma, gamma)) on the [0, 1] image.
        gain: the image is scaled about black by exp(U(-gain, gain)).
        offset: added brightness, U(-offset, offset), in units of the [-1, 1] range.
        noise: standard deviation, up to U(0, noise), of Gaussian noise on white, in the [-1, 1]
            range; half as much on black, linear in between, much as shot and read noise of a sensor
            add up.
    """

    flip: float = 0.5
    scale: float = 0.25
    radius_min: float = 15.0
    radius_max: float = 65.0
    shift: float = 0.25
    reach: float = 0.1
    streaks: float = 0.15
    blur: float = 0.2
    blur_sigma: float = 2.0
    gamma: float = 0.2
    gain: float = 0.3
    offset: float = 0.1
    noise: float = 0.05

    def __post_init__(self) -> None:
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"augment: {name} = {getattr(self, name)}, expected 0 to 1")
        if not 0 < self.radius_min <= self.radius_max:
            raise UsageError(
                f"augment: radii from {self.radius_min} to {self.radius_max} px, expected "
                "0 < radius_min <= radius_max; to leave sizes as they are set scale = 0"
            )
        if not 0 <= self.blur_sigma <= LARGEST_SIGMA:
            raise UsageError(
                f"augment: blur_sigma = {self.blur_sigma} px, expected 0 to {LARGEST_SIGMA}"
            )

    @property
    def moves(self) -> bool:
        """Whether any frame can be scaled or shifted."""
        return self.scale > 0 or (self.shift > 0 and self.reach > 0)

    @property
    def toned(self) -> bool:
        """Whether gamma, gain or offset can change."""
        return bool(self.gamma or self.gain or self.offset)
