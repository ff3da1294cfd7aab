"""From shards to a trained network: what every training program calls.

`pipeline.train` and the scripts in training/ parse flags and call `train`, so that they cannot
differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from pupilseg import tracking
from pupilseg.checkpoint import CHECKPOINT_NAMES
from pupilseg.engine import fit
from pupilseg.loader import make_loader
from pupilseg.models import create_model, model_entry
from pupilseg.shards import open_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from pupilseg.config import FitResult, TrainConfig
    from pupilseg.tracking import Tracker

log = logging.getLogger(__name__)

RENDERED_LICENCE = "MIT; trained on rendered eyes only"
DATA_LICENCE = "bound by the licence of its training data; OpenEDS is for research only"


def train(
    config: TrainConfig,
    shards_dir: Path,
    output_dir: Path,
    *,
    device: torch.device,
    resume: Path | None = None,
    limit: int | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FitResult:
    """Trains a network on a directory of shards.

    Args:
        config: what to train and how.
        shards_dir: holds train/ and validation/.
        output_dir: gets the checkpoints and `{model}_history.csv`.
        device: where to train.
        resume: a training state to go on from.
        limit: use the first `limit` frames of each split only.
        on_epoch: called with each epoch's row.

    Raises:
        PupilSegError: as `open_shards`, `tracking.start` and `fit`.
    """
    with (
        open_shards(shards_dir / "train") as train_shards,
        open_shards(shards_dir / "validation") as valid_shards,
        make_loader(
            train_shards,
            batch_size=config.batch_size,
            device=device,
            shuffle=True,
            seed=config.seed,
            drop_last=True,
            limit=limit,
        ) as train_loader,
        make_loader(
            valid_shards, batch_size=config.batch_size, device=device, limit=limit
        ) as valid_loader,
    ):
        _announce(config, device, train_loader.samples, valid_loader.samples, train_shards.manifest)
        card = data_card(train_shards.manifest, train_loader.samples)
        tracker = _start_tracking(config, card)

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
                resume=resume,
                on_epoch=report,
            )
            status = "KILLED" if result.interrupted else "FINISHED"
            tracker.log_file(result.best_file)
            tracker.log_file(output_dir / CHECKPOINT_NAMES[config.model].history)
        finally:
            tracker.end(status)
        return result


def _start_tracking(config: TrainConfig, card: Mapping[str, Any]) -> Tracker:
    """Opens the run that the environment asks for, with what decides it as parameters."""
    entry = model_entry(config.model)
    return tracking.start(
        {**dataclasses.asdict(config), **card},
        {"model_type": entry.model_type, "architecture": entry.builder.__name__},
        config.model,
    )


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
    train_frames: int,
    valid_frames: int,
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
        train_frames,
        valid_frames,
        device,
        CHECKPOINT_NAMES[config.model].best,
    )
    log.info("configuration: %s", json.dumps(dataclasses.asdict(config)))
