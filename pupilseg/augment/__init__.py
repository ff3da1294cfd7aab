"""Augmentation of whole batches on their device, with exact targets.

A flip mirrors every target with the image. Scaling and shifting move image and label, and the
targets are recomputed from the moved label. The other parts change the image only.

Each part is one file with three functions: `draw` turns random numbers into parameters, `on_host`
applies them to one frame with OpenCV (on the CPU), and `on_device` applies them to a whole batch
with torch (on CUDA). Both forms give the same result for the same parameters. Random numbers come
from a dedicated generator, so a run is a function of its seed. To add a part, write its file, add
its strengths to `AugmentConfig` and one line to `pupilseg.augment.parts.PARTS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pupilseg.augment.config import AugmentConfig

if TYPE_CHECKING:
    from pupilseg.augment.apply import augment

__all__ = ["AugmentConfig", "augment"]


def __getattr__(name: str) -> Any:
    """Imports `augment` on first use (PEP 562), so that the configuration needs no torch."""
    if name != "augment":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pupilseg.augment.apply import augment

    return augment
