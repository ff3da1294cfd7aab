"""The command line that every training program shares, from its flags to its exit code."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from pupilseg.augment import AugmentConfig
from pupilseg.cli.program import finishing, positive_int, whole_number
from pupilseg.errors import UsageError
from pupilseg.model_files.checkpoint import CHECKPOINT_NAMES
from pupilseg.model_files.initial import initial_architecture
from pupilseg.runtime.allocator import keep_freed_memory
from pupilseg.runtime.device import find_device
from pupilseg.runtime.distributed import join_ranks
from pupilseg.shards import open_shards
from pupilseg.train.config import (
    LARGE_BATCH,
    SMALL_BATCH,
    SMALL_BATCH_LR,
    TrainConfig,
    default_batch_size,
)
from pupilseg.train.history import epoch_line
from pupilseg.train.session import train
from pupilseg.weights import PRETRAINED, initial_path

if TYPE_CHECKING:
    from collections.abc import Callable

LATEST = "latest"
"""Value of a bare `--resume`: the training state in the output directory."""
MANY = 1 << 30
"""Frames, before any is counted."""
DEFERRING = "efficientvit_tiny"
"""The network whose metrics stay on a CUDA device until the end: its epochs take a second."""


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a training run; a flag left out takes `TrainConfig`'s default."""
    default = TrainConfig()
    parser.add_argument(
        "--epochs", type=positive_int, default=default.epochs, help="default: %(default)s"
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        help="over all processes of torchrun "
        f"(default: {SMALL_BATCH} on a CPU, {LARGE_BATCH} elsewhere, fewer for few frames)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        help=f"peak learning rate (default: {SMALL_BATCH_LR:g} for a batch of {SMALL_BATCH}, "
        "growing with the square root of the batch)",
    )
    parser.add_argument(
        "--seed", type=whole_number, default=default.seed, help="default: %(default)s"
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 or mps (default: cuda where there is one, else cpu)"
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="start from the weights of a model file (*.pt, *.safetensors), or from the released "
        f"ones: {PRETRAINED}",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="FILE",
        help="go on after the last whole epoch of FILE (alone: of the output directory)",
    )
    parser.add_argument("--limit", type=positive_int, help="use the first N frames of each split")
    parser.add_argument("--no-augment", action="store_true", help="train on the frames as they are")
    fast = parser.add_argument_group("what makes CUDA fast, each on by default")
    fast.add_argument("--no-compile", action="store_true", help="no torch.compile")
    fast.add_argument("--no-amp", action="store_true", help="no mixed precision")
    fast.add_argument("--no-tf32", action="store_true", help="float32 products in full")
    fast.add_argument("--no-cudnn-benchmark", action="store_true", help="cuDNN tries nothing")
    fast.add_argument("--no-channels-last", action="store_true", help="channels before pixels")
    fast.add_argument(
        "--defer-metrics",
        action=argparse.BooleanOptionalAction,
        help=f"tell the epochs' numbers at the end, all at once (default: for {DEFERRING} on CUDA)",
    )


def config_from(
    args: argparse.Namespace, model: str, frames: int = MANY, processes: int = 1
) -> TrainConfig:
    """Makes the configuration of a run from parsed flags.

    Args:
        args: parsed.
        model: name in `pupilseg.models`.
        frames: to train on.
        processes: that share a batch.

    Raises:
        UsageError: a value that cannot be trained with.
    """
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise UsageError(
            f"--lr {args.lr:g} is not a positive number; the default is {SMALL_BATCH_LR:g} for a "
            f"batch of {SMALL_BATCH}"
        )
    device = find_device(args.device)
    defer = args.defer_metrics
    if defer is None:
        defer = model == DEFERRING and device.type == "cuda"
    return TrainConfig(
        model=model,
        epochs=args.epochs,
        batch_size=args.batch_size or default_batch_size(device, frames, processes),
        lr=args.lr or 0.0,
        seed=args.seed,
        augment=None if args.no_augment else AugmentConfig(),
        amp=not args.no_amp,
        tf32=not args.no_tf32,
        channels_last=not args.no_channels_last,
        compile=not args.no_compile,
        cudnn_benchmark=not args.no_cudnn_benchmark,
        defer_metrics=defer,
    )


def resume_file(args: argparse.Namespace, model: str, output_dir: Path) -> Path | None:
    """Returns the training state that `--resume` names.

    Raises:
        UsageError: a bare `--resume` in an output directory without one.
    """
    if args.resume is None:
        return None
    if args.resume != LATEST:
        return Path(args.resume)
    path = output_dir / CHECKPOINT_NAMES[model].state
    if not path.exists():
        raise UsageError(f"nothing to resume: {path} is not there; run once without --resume")
    return path


def train_as_asked(
    args: argparse.Namespace,
    model: str,
    output_dir: Path,
    find_shards: Callable[[], Path],
    tell: Callable[[str], None],
) -> int:
    """Trains as the flags of `add_train_arguments` say; returns the exit code.

    Args:
        args: parsed.
        model: name in `pupilseg.models`.
        output_dir: gets the checkpoints.
        find_shards: returns the directory with train/ and validation/, made if need be. Called
            after all flags were checked: a wrong one should not cost a download.
        tell: prints a line.

    Raises:
        PupilSegError: whatever keeps the run from starting, or from going on.
    """
    config_from(args, model)
    initial = args.init
    if initial is not None:
        initial = initial_path(model, initial)
        initial_architecture(initial, model)
    resume = resume_file(args, model, output_dir)
    with join_ranks(find_device(args.device)) as (ranks, device):
        if args.batch_size is not None:
            ranks.share_of(args.batch_size)
        shards = ranks.after_first(find_shards)
        with open_shards(shards / "train") as train_shards:
            frames = min(len(train_shards), args.limit or MANY)
        config = config_from(args, model, frames, ranks.world_size)
        if device.type == "cpu":
            keep_freed_memory()
        with finishing("this epoch") as stop:
            result = train(
                config,
                shards,
                output_dir,
                device=device,
                ranks=ranks,
                initial=initial,
                resume=resume,
                limit=args.limit,
                on_epoch=lambda row: tell(epoch_line(row, args.epochs)),
                stop=stop,
            )
        if ranks.first and result.interrupted:
            tell(f"interrupted after epoch {len(result.history)}; go on with --resume")
        elif ranks.first:
            tell(f"best: {result.best_file} (mIoU {result.best['valid_iou']:.4f})")
    return 130 if result.interrupted else 0
