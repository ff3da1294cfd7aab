"""The table of augmentation parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pupilseg.augment.blur import Blur
from pupilseg.augment.flip import Flip
from pupilseg.augment.move import Move
from pupilseg.augment.noise import Noise
from pupilseg.augment.streaks import Streaks
from pupilseg.augment.tone import Tone

if TYPE_CHECKING:
    from pupilseg.augment.part import Part

PARTS: tuple[Part[Any], ...] = (
    Flip(),
    Move(),
    Streaks(),
    Blur(),
    Tone(),
    Noise(),
)
"""All parts in the order in which they draw and are applied.

Append new parts at the end: inserting one earlier changes the random numbers of all parts after it,
and so the result of every seed.
"""
