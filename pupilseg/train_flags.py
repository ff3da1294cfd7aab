"""Command-line flags that every training program shares, and the configuration they make."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pupilseg.augment import AugmentConfig
from pupilseg.checkpoint import CHECKPOINT_NAMES
from pupilseg.config import TrainConfig
from pupilseg.errors import UsageError
from pupilseg.program import positive_int, whole_number

if TYPE_CHECKING:
    import argparse

LATEST = "latest"
"""Value of a bare `--resume`: the training state in the output directory."""


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a training run; a flag left out takes `TrainConfig`'s default."""
    default = TrainConfig()
    parser.add_argument(
        "--epochs", type=positive_int, default=default.epochs, help="default: %(default)s"
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=default.batch_size, help="default: %(default)s"
    )
    parser.add_argument(
        "--lr", type=float, default=default.lr, help="peak learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole_number, default=default.seed, help="default: %(default)s"
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 or mps (default: cuda where there is one, else cpu)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="FILE",
        help="go on after the last whole epoch of FILE (alone: of the output directory)",
    )
    parser.add_argument("--limit", type=positive_int, help="use the first N frames of each split")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile on CUDA")
    parser.add_argument("--no-augment", action="store_true", help="train on the frames as they are")


def config_from(args: argparse.Namespace, model: str) -> TrainConfig:
    """Makes the configuration of a run from parsed flags.

    Raises:
        UsageError: a value that cannot be trained with.
    """
    if not 0 < args.lr < math.inf:
        raise UsageError(f"--lr {args.lr:g} is not a positive number; the default is 0.01")
    return TrainConfig(
        model=model,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        compile=not args.no_compile,
        augment=None if args.no_augment else AugmentConfig(),
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
