"""From shards to a trained network: what every training program calls.

`pipeline.train` and the scripts in training/ parse flags and call `train`, so that they cannot
differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pupilseg.loader.loader import make_loader
from pupilseg.model_files.checkpoint import CHECKPOINT_NAMES
from pupilseg.model_files.initial import (
    DATA_LICENCE,
    RENDERED_LICENCE,
    initial_architecture,
    initial_card,
)
from pupilseg.models import create_model, model_entry
from pupilseg.runtime.distributed import ALONE
from pupilseg.shards import open_shards
from pupilseg.tracking import tracker as tracking
from pupilseg.tracking.spool import SPOOL_SUFFIX
from pupilseg.tracking.tracker import Tracker
from pupilseg.train.artifacts import make_artifacts
from pupilseg.train.loop import fit
from pupilseg.train.state import notes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from pupilseg.loader.loader import Loader
    from pupilseg.runtime.distributed import Ranks
    from pupilseg.shards.reader import ShardSet
    from pupilseg.train.config import FitResult, TrainConfig

log = logging.getLogger(__name__)

RUN_NOTE = "mlflow_run"
"""Name of the MLflow run's id in the training state."""
WAIT_SHARE = 0.05
"""Share of the steps' time from which waiting for data is worth a hint."""


def train(
    config: TrainConfig,
    shards_dir: Path,
    output_dir: Path,
    *,
    device: torch.device,
    ranks: Ranks = ALONE,
    initial: Path | None = None,
    resume: Path | None = None,
    limit: int | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Trains a network on a directory of shards, tracked where the environment asks for it.

    Args:
        config: what to train and how.
        shards_dir: holds train/ and validation/.
        output_dir: gets the checkpoints and `{model}_history.csv`.
        device: where to train.
        ranks: the processes of the job, from `parallel.join_ranks`.
        initial: a model file whose weights and architecture the run starts from.
        resume: a training state to go on from.
        limit: use the first `limit` frames of each split only.
        on_epoch: called with each epoch's row.
        stop: asked after each epoch; true ends the run there.

    Raises:
        PupilSegError: as `open_shards`, `tracking.start` and `fit`.
    """
    if initial is not None:
        architecture = initial_architecture(initial, config.model)
        config = dataclasses.replace(config, architecture=architecture)
    share = ranks.share_of(config.batch_size)
    loader = partial(
        make_loader,
        batch_size=share,
        device=device,
        seed=config.seed,
        limit=limit,
        label_dtype=torch.uint8,  # every use converts it; int64 would be 8 times the bytes
        rank=ranks.rank,
        world_size=ranks.world_size,
        compiled=config.compile,
    )
    with (
        open_shards(shards_dir / "train") as train_shards,
        open_shards(shards_dir / "validation") as valid_shards,
        loader(train_shards, shuffle=True, drop_last=True) as train_loader,
        loader(valid_shards) as valid_loader,
    ):
        frames = {
            "train": min(len(train_shards), limit or len(train_shards)),
            "validation": min(len(valid_shards), limit or len(valid_shards)),
        }
        _announce(config, device, ranks, frames, train_shards.manifest)
        card = data_card(train_shards.manifest, frames["train"])
        if initial is not None:
            card |= initial_card(initial, card)
        notes = {} if resume is None else notes_of(resume)
        tracker = _start_tracking(config, card, output_dir, notes) if ranks.first else Tracker()

        def report(row: dict[str, float]) -> None:
            tracker.log_epoch(row)
            if on_epoch is not None:
                on_epoch(row)

        status = "FAILED"
        try:
            result = fit(
                config,
                train_loader,
                valid_loader,
                output_dir,
                device=device,
                card=card,
                ranks=ranks,
                initial=initial,
                resume=resume,
                notes=notes,
                on_epoch=report,
                on_file=partial(tracker.log_artifact, folder="checkpoints"),
                stop=stop,
            )
            _say_waiting(train_loader)
            if tracker.run_id is not None:
                _log_outcome(tracker, config, result, output_dir, valid_shards)
            status = "KILLED" if result.interrupted else "FINISHED"
        finally:
            tracker.end(status)
        return result


def _start_tracking(
    config: TrainConfig, card: Mapping[str, Any], output_dir: Path, notes: dict[str, str]
) -> Tracker:
    """Opens the run that the environment asks for, with what decides it as parameters.

    Args:
        config: of the run.
        card: says which data, never holds them.
        output_dir: gets what the server has not confirmed.
        notes: of the training state; name the run to go on with, and get that of a new one.
    """
    entry = model_entry(config.model)
    tracker = tracking.start(
        {**dataclasses.asdict(config), **card},
        {"model_type": entry.model_type, "architecture": entry.builder.__name__},
        config.model,
        spool=output_dir / f"{config.model}{SPOOL_SUFFIX}",
        run_id=notes.get(RUN_NOTE),
    )
    if tracker.run_id is not None:
        notes[RUN_NOTE] = tracker.run_id
    return tracker


def _say_waiting(loader: Loader) -> None:
    """Says what share of the training steps the network waited for data."""
    share = loader.wait_share
    log.info(
        "waited for data %.1f %% of the training steps%s",
        100 * share,
        "; python -m benchmarks.loader measures the loader alone" if share > WAIT_SHARE else "",
    )


def _log_outcome(
    tracker: Tracker, config: TrainConfig, result: FitResult, output_dir: Path, valid: ShardSet
) -> None:
    """Hands over the best model, the history, and what shows how the run went."""
    history = output_dir / CHECKPOINT_NAMES[config.model].history
    folder = output_dir / f"{config.model}_mlflow"
    tracker.log_artifact(result.best_file, "checkpoints")
    tracker.log_artifact(history)
    for path in make_artifacts(result.best_file, history, valid, folder):
        tracker.log_artifact(path)


def data_card(manifest: Mapping[str, Any], frames: int) -> dict[str, Any]:
    """Returns what a model file says of its data.

    Args:
        manifest: of the training shards.
        frames: how many of them are trained on.
    """
    source = str(manifest["source"])
    rendered = source.startswith("synthetic:")
    digest = hashlib.sha256("".join(file["sha256"] for file in manifest["files"]).encode())
    return {
        "data": source,
        "split_rule": manifest["split_rule"],
        "data_digest": digest.hexdigest(),
        "train_frames": frames,
        "preprocessing": manifest["preprocessing"],
        "licence": RENDERED_LICENCE if rendered else DATA_LICENCE,
    }


def _announce(
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks,
    frames: Mapping[str, int],
    manifest: Mapping[str, Any],
) -> None:
    """Says what is about to be trained, on what and where."""
    model = create_model(config.model, **config.architecture)
    parameters = sum(p.numel() for p in model.parameters())
    log.info(
        "train %s (%s parameters) on %s, %d frames, %d for validation, on %s; best goes to %s",
        config.model,
        f"{parameters:,}",
        manifest["source"],
        frames["train"],
        frames["validation"],
        device if ranks.world_size == 1 else f"{ranks.world_size} processes, this one on {device}",
        CHECKPOINT_NAMES[config.model].best,
    )
    log.info("configuration: %s", json.dumps(dataclasses.asdict(config)))
