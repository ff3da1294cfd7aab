"""Ranges from which the renderer draws its parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


def between(rng: np.random.Generator, low: float, high: float, *, peak: float = 1.0) -> float:
    """Draws from [low, high]; a `peak` above 1 concentrates the draws around the middle."""
    share = rng.beta(peak, peak) if peak > 1 else rng.random()
    return float(low + (high - low) * share)


class Range(NamedTuple):
    """A range with uniform draws, or with draws concentrated around the middle.

    Attributes:
        low: lower end.
        high: upper end.
        peak: both parameters of a beta distribution; 1 is uniform.
    """

    low: float
    high: float
    peak: float = 1.0

    def draw(self, rng: np.random.Generator) -> float:
        """Returns a random value."""
        return between(rng, self.low, self.high, peak=self.peak)


class Skewed(NamedTuple):
    """A range with draws concentrated at the lower end.

    Attributes:
        low: lower end.
        high: upper end.
        power: exponent of a uniform number in [0, 1], above 1.
    """

    low: float
    high: float
    power: float

    def draw(self, rng: np.random.Generator) -> float:
        """Returns a random value."""
        return self.low + (self.high - self.low) * rng.random() ** self.power


class Count(NamedTuple):
    """A range of whole numbers, uniform.

    Attributes:
        low: smallest.
        stop: one more than the largest.
    """

    low: int
    stop: int

    def draw(self, rng: np.random.Generator) -> int:
        """Returns a random number."""
        return int(rng.integers(self.low, self.stop))
