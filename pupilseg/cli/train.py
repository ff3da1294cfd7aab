"""Runs a training command, from its parsed flags to its exit code."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pupilseg.cli.program import finishing
from pupilseg.cli.train_flags import LATEST, config_from
from pupilseg.errors import UsageError
from pupilseg.model_files.checkpoint import read_initial_card
from pupilseg.models import model_entry
from pupilseg.runtime.device import find_device
from pupilseg.runtime.distributed import Ranks, join_ranks, local_ranks
from pupilseg.runtime.host import available_cores, keep_freed_memory
from pupilseg.shards import open_shards
from pupilseg.train.checkpoints import epoch_line
from pupilseg.train.config import default_batch_size
from pupilseg.train.session import train
from pupilseg.weights import initial_path

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from pupilseg.train.config import TrainConfig

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
FRAME_S = 0.045
"""Seconds per training frame on one core (docs/benchmarks.md)."""
SHORT_RUN_S = 30.0
"""Estimated time below which a run has one process: others take 3 s to start."""


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
    with join_ranks(find_device(args.device)) as (joined, device), ExitStack() as stack:
        ranks = joined
        if args.processes is not None and (device.type != "cpu" or ranks.world_size > 1):
            raise UsageError(
                "--processes starts processes on the CPU of this machine; for several GPUs, or "
                "with torchrun, use: torchrun --nproc-per-node N"
            )
        if config.batch_size is not None:
            ranks.share_of(config.batch_size)
        shards = ranks.after_first(find_shards)
        if args.num_workers is not None:
            log.info(
                "--num-workers %d: data are loaded by %s; there are no worker processes",
                args.num_workers,
                f"{args.num_workers} threads" if args.num_workers else "the training thread",
            )
        work = partial(
            train,
            config,
            shards,
            output_dir,
            device=device,
            initial=initial,
            resume=resume,
            limit=args.limit,
            threads=args.num_workers,
            track=args.mlflow,
        )
        if device.type == "cpu":
            keep_freed_memory()
            torch.set_num_threads(args.threads or 1)
            if ranks.world_size == 1:
                processes = _choose_processes(args, config, shards)
                others = partial(_train_rank, work, args.threads or 1)
                ranks = stack.enter_context(local_ranks(processes, others))
        stop = stack.enter_context(finishing("this epoch"))
        result = work(
            ranks=ranks,
            on_epoch=lambda row: print_line(epoch_line(row, config.epochs)),
            stop=stop,
        )
        if ranks.first and result.interrupted:
            print_line(f"interrupted after epoch {len(result.history)}; continue with --resume")
        elif ranks.first:
            print_line(f"best: {result.best_file} (mIoU {result.best['valid_iou']:.4f})")
    return 130 if result.interrupted else 0


def _train_rank(work: Callable[..., object], threads: int, ranks: Ranks) -> None:
    """Trains in another process than the first."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    work(ranks=ranks)


def _choose_processes(args: argparse.Namespace, config: TrainConfig, shards: Path) -> int:
    """Returns how many processes train on this machine, and logs the reason.

    Raises:
        UsageError: `--processes` does not divide the batch size.
    """
    with open_shards(shards / "train") as split:
        frames = min(len(split), args.limit or len(split))
    batch_size = config.batch_size or default_batch_size(CPU, frames)
    if args.processes is not None:
        Ranks(0, args.processes).share_of(batch_size)
        return int(args.processes)
    cores = available_cores()
    processes = max(n for n in range(1, cores + 1) if batch_size % n == 0)
    seconds = config.epochs * frames * FRAME_S
    if processes > 1 and seconds < SHORT_RUN_S:
        log.info("one process: the run takes about %.0f s, others seconds to start", seconds)
        return 1
    log.info(
        "%d of %d CPU cores are used, one process each, which share batches of %d frames; change "
        "this with --processes N or --threads N",
        processes,
        cores,
        batch_size,
    )
    return processes


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
