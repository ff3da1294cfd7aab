"""Runs a training command with parsed flags."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pupilseg.cli.program import finishing
from pupilseg.cli.train_flags import LATEST, config_from
from pupilseg.errors import OutputError, UsageError
from pupilseg.model_files.checkpoint import read_initial_card
from pupilseg.models import model_entry
from pupilseg.runtime.device import find_device
from pupilseg.runtime.distributed import Ranks, join_ranks, local_ranks
from pupilseg.runtime.host import available_cores, keep_freed_memory
from pupilseg.shards import open_shards
from pupilseg.train.checkpoints import claim_directory, epoch_line, run_files
from pupilseg.train.config import default_batch_size
from pupilseg.train.session import train
from pupilseg.weights import initial_path

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from pupilseg.train.config import TrainConfig

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
FRAME_S = 0.045
"""Estimated seconds per training frame on one core (docs/benchmarks.md)."""
SHORT_RUN_S = 30.0
"""Runs estimated to be shorter use one process, because starting others takes 3 s."""


def run_training(
    args: argparse.Namespace,
    model: str,
    output_dir: Path,
    find_shards: Callable[[], Path],
    print_line: Callable[[str], None],
    output_flag: str = "--output-dir",
) -> int:
    """Trains a network according to the flags of `add_train_flags`; returns the exit code.

    Args:
        args: the parsed flags.
        model: name in `pupilseg.models`.
        output_dir: receives the checkpoints.
        find_shards: returns the directory with train/ and validation/, which it creates if
            necessary. Called after all flags have been checked, so that no data is downloaded for
            an invalid flag.
        print_line: prints a line of output.
        output_flag: flag that sets `output_dir`, for messages.

    Raises:
        PupilSegError: the run cannot start or continue.
    """
    model_entry(model)
    config = config_from(args, model)
    initial = None if args.init is None else initial_path(model, args.init)
    if initial is not None:
        read_initial_card(initial, model)
    resume = _resume_file(args, model, output_dir)
    with join_ranks(find_device(args.device)) as (joined, device), ExitStack() as stack:
        ranks = joined
        if args.processes is not None and (device.type != "cpu" or ranks.world_size > 1):
            raise UsageError(
                "--processes starts processes on the CPU of this machine; for several GPUs, or "
                "with torchrun, use: torchrun --nproc-per-node N"
            )
        if config.batch_size is not None:
            ranks.share_of(config.batch_size)
        claim = claim_directory(
            output_dir, model, resume=resume, overwrite=args.overwrite, flag=output_flag
        )

        def prepare() -> Path:
            if joined.first:
                stack.enter_context(claim)
            return find_shards()

        shards = joined.after_first(prepare)
        _log_num_workers(args.num_workers)
        work = partial(
            train,
            config,
            shards,
            output_dir,
            device=device,
            initial=initial,
            resume=resume,
            overwrite=args.overwrite,
            claimed=True,
            limit=args.limit,
            threads=args.num_workers,
            track=args.mlflow,
        )
        if device.type == "cpu":
            _set_up_cpu(args.threads)
            if ranks.world_size == 1:
                processes = _choose_processes(args, config, shards)
                others = partial(_train_rank, work, args.threads)
                ranks = stack.enter_context(local_ranks(processes, others))
        stop = stack.enter_context(finishing("this epoch"))
        stack.enter_context(_resume_hint(output_dir, model))
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


def _log_num_workers(threads: int | None) -> None:
    if threads is not None:
        log.info(
            "--num-workers %d: data is loaded by %s, without worker processes",
            threads,
            f"{threads} threads" if threads else "the training thread",
        )


def _set_up_cpu(threads: int | None) -> None:
    """Sets the allocator and the number of threads of a process that trains on the CPU."""
    keep_freed_memory()
    torch.set_num_threads(threads or 1)


def _train_rank(work: Callable[..., object], threads: int | None, ranks: Ranks) -> None:
    """Trains in a process other than the first."""
    _set_up_cpu(threads)
    work(ranks=ranks)


def _choose_processes(args: argparse.Namespace, config: TrainConfig, shards: Path) -> int:
    """Returns the number of training processes on this machine, and logs the reason.

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
        log.info(
            "one process: the run takes about %.0f s, and more processes take seconds to start",
            seconds,
        )
        return 1
    log.info(
        "using %d of %d CPU cores, with one process each, which share batches of %d frames; to "
        "change this, pass --processes N or --threads N",
        processes,
        cores,
        batch_size,
    )
    return processes


@contextmanager
def _resume_hint(output_dir: Path, model: str) -> Iterator[None]:
    """Adds the flag needed to run the command again to the error for a full disk."""
    try:
        yield
    except OutputError as error:
        if not (left := run_files(output_dir, model)):
            raise
        resumable = left[0].name == model_entry(model).state_file
        flag = "--resume to continue after the last saved epoch" if resumable else "--overwrite"
        raise OutputError(f"{error}; then add {flag}") from error


def _resume_file(args: argparse.Namespace, model: str, output_dir: Path) -> Path | None:
    """Returns the training state that `--resume` refers to.

    Raises:
        UsageError: `--resume` was passed without a file, and the output directory has none, or
            `--overwrite` was passed too.
    """
    if args.resume is None:
        return None
    if args.resume != LATEST:
        return Path(args.resume)
    if args.overwrite:
        raise UsageError(
            "--resume continues the run that --overwrite removes; pass only one of them"
        )
    path = output_dir / model_entry(model).state_file
    if not path.exists():
        left = run_files(output_dir, model)
        without = "with --overwrite instead" if left else "once without --resume"
        raise UsageError(f"nothing to resume: {path} does not exist; run {without}")
    return path
