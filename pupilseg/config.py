"""What decides a training run, and what a run comes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pupilseg.augment import AugmentConfig

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that decides a run, printed at its start and stored in its checkpoints.

    Attributes:
        model: name in `pupilseg.models`.
        architecture: overrides of the network's keyword arguments.
        epochs: length of the run.
        batch_size: frames a step (recorded; the loader was made with it).
        lr: peak learning rate of the one-cycle schedule.
        weight_decay: of AdamW, on convolution and linear weights only.
        warmup: share of the steps over which the rate rises.
        ema_decay: per-step decay of the averaged weights, which are what is validated and saved.
        clip: largest gradient norm.
        seed: of initial weights, order and augmentation.
        compile: `torch.compile` on CUDA.
        amp: mixed precision on CUDA.
        augment: strengths; None trains on the frames as they are.
    """

    model: str = "efficientvit"
    architecture: dict[str, Any] = field(default_factory=dict)
    epochs: int = 15
    batch_size: int = 8
    lr: float = 1e-2
    weight_decay: float = 1e-2
    warmup: float = 0.15
    ema_decay: float = 0.99
    clip: float = 1.0
    seed: int = 0
    compile: bool = True
    amp: bool = True
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a run came to.

    Attributes:
        best_file: model file with the best validation mIoU.
        best: that epoch's row.
        history: a row an epoch: epoch (from 1), lr, alpha, train_* and valid_* scores. Times are
            told to `on_epoch` alone: what is kept of a run is a function of its seed.
        interrupted: the run was stopped by the user after a whole epoch.
    """

    best_file: Path
    best: dict[str, float]
    history: list[dict[str, float]]
    interrupted: bool
