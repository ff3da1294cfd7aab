"""Runs a training command, from its parsed flags to its exit code."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pupilseg.cli.program import finishing
from pupilseg.cli.train_flags import LATEST, config_from
from pupilseg.errors import UsageError
from pupilseg.model_files.checkpoint import read_initial_card
from pupilseg.models import model_entry
from pupilseg.runtime.device import find_device
from pupilseg.runtime.distributed import join_ranks
from pupilseg.runtime.memory import keep_freed_memory
from pupilseg.train.checkpoints import epoch_line
from pupilseg.train.session import train
from pupilseg.weights import initial_path

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

log = logging.getLogger(__name__)


def run_training(
    args: argparse.Namespace,
    model: str,
    output_dir: Path,
    find_shards: Callable[[], Path],
    print_line: Callable[[str], None],
) -> int:
    """Trains as the flags of `add_train_flags` request; returns the exit code.

    Args:
        args: the parsed flags.
        model: name in `pupilseg.models`.
        output_dir: receives the checkpoints.
        find_shards: returns the directory with train/ and validation/, after creating it if
            necessary. Called after all flags were checked, so that a wrong one costs no download.
        print_line: prints a line.

    Raises:
        PupilSegError: the run cannot start or continue.
    """
    config = config_from(args, model)
    initial = None if args.init is None else initial_path(model, args.init)
    if initial is not None:
        read_initial_card(initial, model)
    resume = _resume_file(args.resume, model, output_dir)
    with join_ranks(find_device(args.device)) as (ranks, device):
        if config.batch_size is not None:
            ranks.share_of(config.batch_size)
        shards = ranks.after_first(find_shards)
        if device.type == "cpu":
            keep_freed_memory()
        if args.num_workers is not None:
            log.info(
                "--num-workers %d: data are loaded by %s; there are no worker processes",
                args.num_workers,
                f"{args.num_workers} threads" if args.num_workers else "the training thread",
            )
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
                threads=args.num_workers,
                track=args.mlflow,
                on_epoch=lambda row: print_line(epoch_line(row, config.epochs)),
                stop=stop,
            )
        if ranks.first and result.interrupted:
            print_line(f"interrupted after epoch {len(result.history)}; continue with --resume")
        elif ranks.first:
            print_line(f"best: {result.best_file} (mIoU {result.best['valid_iou']:.4f})")
    return 130 if result.interrupted else 0


def _resume_file(resume: str | None, model: str, output_dir: Path) -> Path | None:
    """Returns the training state that `--resume` refers to.

    Raises:
        UsageError: `--resume` was passed without a file, and the output directory has none.
    """
    if resume is None:
        return None
    if resume != LATEST:
        return Path(resume)
    path = output_dir / model_entry(model).state_file
    if not path.exists():
        raise UsageError(f"nothing to resume: {path} does not exist; run once without --resume")
    return path
