"""Trains a network on shards; the entry point of all training programs.

`pipeline.train` and the scripts in training/ only parse flags and call `train`, so that they train
in the same way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pupilseg.loader.loader import make_loader
from pupilseg.model_files.card import DATA_LICENSE, RENDERED_LICENSE, Provenance
from pupilseg.model_files.checkpoint import read_initial_card
from pupilseg.models import model_entry
from pupilseg.runtime.distributed import ALONE
from pupilseg.shards import open_shards
from pupilseg.tracking import RunInfo, Trackers
from pupilseg.tracking import start as start_tracking
from pupilseg.train.artifacts import make_artifacts
from pupilseg.train.checkpoints import CheckpointWriter, claim_directory
from pupilseg.train.loop import fit
from pupilseg.train.state import TrainState, notes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from pupilseg.loader.loader import Loader
    from pupilseg.runtime.distributed import Ranks
    from pupilseg.shards.reader import ShardSet
    from pupilseg.train.config import FitResult, TrainConfig

log = logging.getLogger(__name__)

WAIT_SHARE = 0.05
"""Share of the training time spent waiting for data above which a hint is logged."""


def train(
    config: TrainConfig,
    shards_dir: Path,
    output_dir: Path,
    *,
    device: torch.device,
    ranks: Ranks = ALONE,
    initial: Path | None = None,
    resume: Path | None = None,
    overwrite: bool = False,
    claimed: bool = False,
    limit: int | None = None,
    threads: int | None = None,
    track: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Trains a network on a directory of shards, tracked if the environment enables it.

    Args:
        config: fields that are None get defaults that suit the device and the data.
        shards_dir: directory with train/ and validation/.
        output_dir: receives the files that the network's `ModelEntry` names.
        device: from `runtime.device.find_device`.
        ranks: from `runtime.distributed.join_ranks`.
        initial: model file whose weights and architecture the run starts from.
        resume: training state to resume from.
        overwrite: replace another run of the network in `output_dir`; its files are removed when
            the first epoch of this run has ended.
        claimed: the caller holds `claim_directory` of `output_dir`.
        limit: use the first `limit` frames of each split only.
        threads: number of threads per loader; None for the loader's default.
        track: start the trackers that the environment enables.
        on_epoch: called with each epoch's history row and its train_seconds and valid_seconds.
        stop: called after each epoch; True ends the run there.

    Raises:
        LockedError: another process is training into `output_dir`.
        UsageError: `output_dir` holds another run of the network; pass `resume` or `overwrite`.
        PupilSegError: as `open_shards`, `tracking.start` and `fit`.
    """
    if initial is not None:
        before = read_initial_card(initial, config.model)
        config = dataclasses.replace(config, architecture=before.architecture)
    with ExitStack() as stack:
        if ranks.first and not claimed:
            claim = claim_directory(output_dir, config.model, resume=resume, overwrite=overwrite)
            stack.enter_context(claim)
        train_shards = stack.enter_context(open_shards(shards_dir / "train"))
        valid_shards = stack.enter_context(open_shards(shards_dir / "validation"))
        frames = min(len(train_shards), limit or len(train_shards))
        valid_frames = min(len(valid_shards), limit or len(valid_shards))
        config = config.resolved(device, frames, ranks.world_size)
        assert config.batch_size is not None
        loader = partial(
            make_loader,
            batch_size=ranks.share_of(config.batch_size),
            device=device,
            seed=config.seed,
            limit=limit,
            threads=threads,
            label_dtype=torch.uint8,  # converted at each use; int64 would take 8 times the memory
            rank=ranks.rank,
            world_size=ranks.world_size,
            compiled=config.compile,
        )
        train_loader = stack.enter_context(loader(train_shards, shuffle=True, drop_last=True))
        valid_loader = stack.enter_context(loader(valid_shards))
        log.info(
            "training on %s: %d frames, %d for validation, on %s",
            train_shards.manifest["source"],
            frames,
            valid_frames,
            f"{ranks.world_size} processes, this one on {device}"
            if ranks.world_size > 1
            else device,
        )
        log.info("configuration: %s", json.dumps(dataclasses.asdict(config)))
        provenance = data_provenance(train_shards.manifest, frames)
        if initial is not None:
            provenance = provenance.starting_from(initial, before)
        notes = {} if resume is None else notes_of(resume)
        trackers = Trackers()
        if ranks.first and track:
            trackers = _start_tracking(config, provenance, output_dir, notes)
            notes |= trackers.notes

        def report(row: dict[str, float]) -> None:
            trackers.log_epoch(row)
            if on_epoch is not None:
                on_epoch(row)

        status = "FAILED"
        try:
            steps = len(train_loader) * config.epochs
            state = TrainState(config, device, steps, provenance, ranks, notes, initial)
            log.info(
                "network %s: %s parameters; the best model is written to %s",
                config.model,
                f"{sum(p.numel() for p in state.parameters):,}",
                output_dir / model_entry(config.model).best_file,
            )
            writer = CheckpointWriter(
                state, output_dir, report, partial(trackers.log_file, folder="checkpoints")
            )
            if resume is not None:
                writer.resume(resume)
            result = fit(state, train_loader, valid_loader, writer, stop)
            _log_wait_share(train_loader)
            if trackers:
                _log_outcome(trackers, config, result, output_dir, valid_shards)
            status = "KILLED" if result.interrupted else "FINISHED"
        finally:
            trackers.end(status)
        return result


def _start_tracking(
    config: TrainConfig, provenance: Provenance, output_dir: Path, notes: Mapping[str, str]
) -> Trackers:
    """Starts the trackers that the environment enables; `notes` name the runs to resume."""
    entry = model_entry(config.model)
    run = RunInfo(
        config.model,
        {**dataclasses.asdict(config), **provenance.to_dict()},
        {"model_type": entry.model_type, "architecture": entry.class_name},
        output_dir / entry.history_file,
    )
    return start_tracking(run, notes)


def _log_wait_share(loader: Loader) -> None:
    share = loader.wait_share
    log.info(
        "waited for data in %.1f %% of the training time%s",
        100 * share,
        "; python -m benchmarks.loader measures the loader alone" if share > WAIT_SHARE else "",
    )


def _log_outcome(
    trackers: Trackers, config: TrainConfig, result: FitResult, output_dir: Path, valid: ShardSet
) -> None:
    """Logs the best model, the history, curves and sample predictions."""
    history = output_dir / model_entry(config.model).history_file
    folder = output_dir / f"{config.model}_mlflow"
    trackers.log_file(result.best_file, "checkpoints")
    trackers.log_file(history)
    for path in make_artifacts(result.best_file, history, valid, folder):
        trackers.log_file(path)


def data_provenance(manifest: Mapping[str, Any], frames: int) -> Provenance:
    """Returns the provenance of weights trained on shards.

    Args:
        manifest: manifest of the training shards.
        frames: number of frames used for training.
    """
    source = str(manifest["source"])
    rendered = source.startswith("synthetic:")
    digest = hashlib.sha256("".join(file["sha256"] for file in manifest["files"]).encode())
    return Provenance(
        data=source,
        split_rule=manifest["split_rule"],
        data_digest=digest.hexdigest(),
        train_frames=frames,
        preprocessing=manifest["preprocessing"],
        license=RENDERED_LICENSE if rendered else DATA_LICENSE,
    )
