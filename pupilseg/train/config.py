"""What decides a training run, and what a run comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pupilseg.augment import AugmentConfig

if TYPE_CHECKING:
    from pathlib import Path

    import torch


SMALL_BATCH, SMALL_BATCH_LR = 4, 1e-2
"""What learns most from few frames (docs/benchmarks.md)."""
LARGE_BATCH = 32
"""What keeps a GPU busy."""
LEAST_STEPS = 8
"""Of an epoch: a few frames make smaller batches."""


def default_batch_size(device: torch.device, frames: int, processes: int = 1) -> int:
    """Returns the batch size where none was asked for, over all processes.

    A CPU takes the same time a frame for any, a GPU wants large ones.
    """
    most = SMALL_BATCH if device.type == "cpu" else LARGE_BATCH
    wanted = min(most, frames // LEAST_STEPS)
    return max(1, wanted // processes) * processes


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that decides a run, printed at its start and stored in its checkpoints.

    Attributes:
        model: name in `pupilseg.models`.
        architecture: overrides of the network's keyword arguments.
        epochs: length of the run.
        batch_size: frames a step, over all processes (the loader was made with it).
        lr: peak learning rate of the one-cycle schedule; 0 takes 1e-2 * sqrt(batch_size / 4), the
            square-root rule for adaptive optimizers (Malladi et al., arXiv 2205.10287).
        weight_decay: of AdamW, on convolution and linear weights only.
        warmup: share of the steps over which the rate rises.
        ema_decay: per-step decay of the averaged weights, which are what is validated and saved.
        clip: largest gradient norm.
        seed: of initial weights, order and augmentation.
        amp: mixed precision on CUDA: bfloat16 where the hardware has it, else float16, scaled.
        tf32: float32 products in TF32 on CUDA.
        channels_last: images and kernels with their channels innermost.
        augment: strengths; None trains on the frames as they are.
        compile: `torch.compile` on CUDA.
        cudnn_benchmark: let cuDNN try which kernels are fastest, on CUDA.
        defer_metrics: leave the epochs' numbers on the device until the run ends.
    """

    model: str = "efficientvit"
    architecture: dict[str, Any] = field(default_factory=dict)
    epochs: int = 15
    batch_size: int = SMALL_BATCH
    lr: float = 0.0
    weight_decay: float = 1e-2
    warmup: float = 0.15
    ema_decay: float = 0.99
    clip: float = 1.0
    seed: int = 0
    amp: bool = True
    tf32: bool = True
    channels_last: bool = True
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    compile: bool = True
    cudnn_benchmark: bool = True
    defer_metrics: bool = False

    def __post_init__(self) -> None:
        if self.lr == 0:
            rate = SMALL_BATCH_LR * math.sqrt(self.batch_size / SMALL_BATCH)
            object.__setattr__(self, "lr", rate)


SPEED_ONLY = ("compile", "cudnn_benchmark", "defer_metrics")
"""Fields that make a run faster or slower, but no other run."""


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
