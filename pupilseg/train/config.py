"""Training configuration and results.

This module imports neither torch nor NumPy: `pupilseg.cli.train_flags` creates the command line of
every training program from the fields below, also on machines where only modal is installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pupilseg.augment.config import AugmentConfig
from pupilseg.errors import UsageError
from pupilseg.models.registry import model_entry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch


SMALL_BATCH = 4
"""Batch size that gives the best results with few frames (docs/benchmarks.md)."""
SMALL_BATCH_LR = 1e-2
"""Peak learning rate for `SMALL_BATCH`."""
LARGE_BATCH = 32
"""Batch size that keeps a GPU busy."""
MIN_STEPS = 8
"""Minimum number of steps per epoch; with few frames, the default batch size is reduced."""
MANY_FRAMES = 1 << 30


class Check(NamedTuple):
    """A condition on a value.

    Attributes:
        passes: returns whether a value meets it.
        expected: the condition in words.
    """

    passes: Callable[[float], bool]
    expected: str


COUNT = Check(lambda x: x >= 1, "a whole number of at least 1")
SEED = Check(lambda x: x >= 0, "a whole number of at least 0")
POSITIVE = Check(lambda x: 0 < x < math.inf, "a positive number")
NOT_NEGATIVE = Check(lambda x: 0 <= x < math.inf, "a number of at least 0")
SHARE = Check(lambda x: 0 <= x <= 1, "a number from 0 to 1")


def _option(
    default: Any,
    text: str,
    check: Check | None = None,
    *,
    alias: str | None = None,
    choices: tuple[str, ...] | None = None,
    shown_default: str | None = None,
    cuda: bool = False,
) -> Any:
    """Returns a dataclass field with the metadata of its flag.

    Args:
        default: default of the field.
        text: help text.
        check: condition on the value.
        alias: another name of the flag.
        choices: the valid values.
        shown_default: replaces the default in the help text.
        cuda: the flag is listed under "CUDA performance".
    """
    metadata = {
        "help": text,
        "check": check,
        "alias": alias,
        "choices": choices,
        "shown_default": shown_default,
        "cuda": cuda,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that determines a run; printed when it starts and stored in its checkpoints.

    Each field's metadata holds its help text. Fields that default to None depend on the device or
    the data: `resolved` fills them in.

    Attributes:
        model: name in `pupilseg.models`.
        architecture: overrides of the network's keyword arguments.
        augment: strengths of the augmentation; None trains on the frames as they are.

    Raises:
        UsageError: a value is out of range.
    """

    model: str = "efficientvit"
    architecture: dict[str, Any] = field(default_factory=dict)
    epochs: int = _option(15, "number of passes over the training split", COUNT)
    batch_size: int | None = _option(
        None,
        "frames per step, over all processes of torchrun",
        COUNT,
        shown_default=f"{SMALL_BATCH} on a CPU, {LARGE_BATCH} elsewhere, fewer for few frames",
    )
    lr: float | None = _option(
        None,
        "peak learning rate of the one-cycle schedule",
        POSITIVE,
        alias="--learning-rate",
        # The square-root rule for adaptive optimizers (Malladi et al., arXiv 2205.10287).
        shown_default=f"{SMALL_BATCH_LR:g} * sqrt(batch size / {SMALL_BATCH})",
    )
    weight_decay: float = _option(
        1e-2, "weight decay of AdamW, for convolution and linear weights", NOT_NEGATIVE
    )
    warmup: float = _option(0.15, "share of the steps over which the learning rate rises", SHARE)
    ema_decay: float = _option(
        0.99, "decay per step of the averaged weights, which are validated and saved", SHARE
    )
    clip: float = _option(1.0, "largest gradient norm", POSITIVE)
    seed: int = _option(0, "seed of the initial weights, the order and the augmentation", SEED)
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    amp: bool = _option(True, "mixed precision", cuda=True)
    amp_dtype: str = _option(
        "auto",
        "type of mixed precision; auto is bfloat16 on GPUs that have it, float16 on other GPUs "
        "and float32 without CUDA; float16 scales the gradients",
        choices=("auto", "float16", "bfloat16"),
        cuda=True,
    )
    tf32: bool = _option(True, "TF32 for float32 products", cuda=True)
    channels_last: bool = _option(True, "channels_last memory layout (NHWC)", cuda=True)
    compile: bool = _option(True, "torch.compile", cuda=True)
    cudnn_benchmark: bool = _option(True, "autotuning of cuDNN's kernels", cuda=True)
    defer_metrics: bool | None = _option(
        None,
        "keep metrics on the device and report all epochs at the end; files are written every 10 "
        "epochs and at the end",
        shown_default="on CUDA, for networks with very short epochs",
        cuda=True,
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            check, value = item.metadata.get("check"), getattr(self, item.name)
            if check is not None and value is not None and not check.passes(value):
                raise UsageError(
                    f"--{item.name.replace('_', '-')} {value:g}: expected {check.expected}"
                )
            choices = item.metadata.get("choices")
            if choices is not None and value not in choices:
                raise UsageError(
                    f"--{item.name.replace('_', '-')} {value}: expected {', '.join(choices)}"
                )

    def resolved(self, device: torch.device, frames: int = MANY_FRAMES, processes: int = 1) -> Self:
        """Returns a copy whose batch_size, lr and defer_metrics are not None.

        Args:
            device: the training device.
            frames: number of training frames.
            processes: number of processes that share a batch.
        """
        batch_size = self.batch_size
        if batch_size is None:
            batch_size = default_batch_size(device, frames, processes)
        lr = self.lr
        if lr is None:
            lr = SMALL_BATCH_LR * math.sqrt(batch_size / SMALL_BATCH)
        defer = self.defer_metrics
        if defer is None:
            defer = device.type == "cuda" and model_entry(self.model).defer_metrics
        return replace(self, batch_size=batch_size, lr=lr, defer_metrics=defer)


SPEED_ONLY = ("compile", "cudnn_benchmark", "defer_metrics")
"""Fields that may change when a run is resumed, because they only affect its speed."""


def default_batch_size(device: torch.device, frames: int, processes: int = 1) -> int:
    """Returns the total batch size if none was requested; a multiple of `processes`.

    A CPU takes the same time per frame for any batch size; a GPU is faster with large batches.
    """
    largest = SMALL_BATCH if device.type == "cpu" else LARGE_BATCH
    wanted = min(largest, frames // MIN_STEPS)
    return max(1, wanted // processes) * processes


@dataclass(frozen=True, slots=True)
class FitResult:
    """Result of a run.

    Attributes:
        best_file: model file with the best validation mIoU.
        best: that epoch's history row.
        history: one row per epoch: epoch (from 1), lr, alpha, train_* and valid_* scores. Times
            are not included, so that the history is a function of the seed.
        interrupted: whether the user stopped the run before its last epoch.
    """

    best_file: Path
    best: dict[str, float]
    history: list[dict[str, float]]
    interrupted: bool
