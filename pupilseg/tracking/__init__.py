"""Experiment tracking.

To add a tracker, write one module here with a function `start` (see `tracker.TrackerEntry`), and
add one line to `tracker.TRACKERS`.
"""

from pupilseg.tracking.tracker import (
    TRACKERS,
    RunInfo,
    Tracker,
    TrackerEntry,
    Trackers,
    enabling_variables,
    start,
)

__all__ = [
    "TRACKERS",
    "RunInfo",
    "Tracker",
    "TrackerEntry",
    "Trackers",
    "enabling_variables",
    "start",
]
