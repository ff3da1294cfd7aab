"""Training: configuration, loop, losses, metrics and checkpoints."""

from pupilseg.train.config import FitResult, TrainConfig
from pupilseg.train.session import train

__all__ = ["FitResult", "TrainConfig", "train"]
