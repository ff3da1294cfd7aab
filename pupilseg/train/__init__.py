"""Training: configuration, loop, losses, metrics and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pupilseg.train.config import FitResult, TrainConfig

if TYPE_CHECKING:
    from pupilseg.train.session import train

__all__ = ["FitResult", "TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    """Imports `train` on first use (PEP 562), so that the configuration needs no torch."""
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pupilseg.train.session import train

    return train
