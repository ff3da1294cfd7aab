"""The one training loop, readable top to bottom.

Everything random is a function of (seed, epoch, step), everything measured stays on the device
until the epoch is over, and what is written at an epoch's end is enough to go on from there.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from pupilseg.augment import augment
from pupilseg.checkpoint import (
    CHECKPOINT_NAMES,
    load_tensors,
    load_weights,
    plain_state_dict,
    save_model,
    save_state,
)
from pupilseg.config import FitResult, TrainConfig
from pupilseg.errors import CheckpointError, UsageError
from pupilseg.files import atomic_path
from pupilseg.history import write_history
from pupilseg.losses import (
    ELLIPSE_TERMS,
    SEGMENTATION_TERMS,
    alpha_schedule,
    ellipse_loss,
    segmentation_loss,
)
from pupilseg.metrics import EpochMetrics, predicted_mask, scores
from pupilseg.models import create_model, model_entry
from pupilseg.optim import AveragedWeights, learning_rate, parameter_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import nn

    from pupilseg.loader import Loader

log = logging.getLogger(__name__)

STATE_FORMAT = 1


class Run:
    """State of one training run; `fit` drives it.

    Args:
        config: see `TrainConfig`.
        device: from `pupilseg.device.find_device`.
        total_steps: optimizer steps in the whole run.
        card: what the run's files say of its data.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        total_steps: int,
        card: Mapping[str, Any],
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device, self.total_steps = config, device, total_steps
        self.card = dict(card)
        entry = model_entry(config.model)
        segments = entry.task == "segmentation"
        self.criterion = segmentation_loss if segments else ellipse_loss
        self.loss_names = SEGMENTATION_TERMS if segments else ELLIPSE_TERMS
        # Built on the CPU, so that a seed gives the same weights whatever the device.
        self.model = create_model(config.model, **config.architecture)
        # Measured on 2 CPU cores: a training step takes 34 ms a frame in this layout, 51 without.
        self.model = self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this form
        self.averaged = AveragedWeights(self.model, config.ema_decay)
        self.evaluated = create_model(config.model, **config.architecture)
        self.evaluated = self.evaluated.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay), lr=config.lr
        )
        cuda = device.type == "cuda" and config.amp
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.autocast: dict[str, Any] = {
            "device_type": device.type,
            "dtype": torch.bfloat16 if bf16 or not cuda else torch.float16,
            "enabled": cuda,
        }
        self.scaler = torch.amp.GradScaler(device.type, enabled=cuda and not bf16)
        self.random = torch.Generator(device).manual_seed(config.seed)
        self.metrics = EpochMetrics(self.loss_names, device)
        self.epoch, self.step = 0, 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}

    def train_epoch(self, loader: Loader, alpha: float) -> torch.Tensor:
        """Runs one pass over the training split; returns the metrics' sums, on the device."""
        self.model.train()
        self.metrics.reset()
        loader.set_epoch(self.epoch)
        for batch in _progress(loader, f"epoch {self.epoch + 1} train"):
            if self.config.augment is not None:
                batch = augment(batch, self.config.augment, self.random)  # noqa: PLW2901
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(
                    self.step, self.total_steps, self.config.lr, self.config.warmup
                )
            image = batch.image.contiguous(memory_format=torch.channels_last)
            with torch.autocast(**self.autocast):
                output = self.model(image)
            losses = self.criterion(output, batch, alpha)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(losses["loss"]).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.averaged.update(self.model)
            self.metrics.update(losses, predicted_mask(output), batch.label, batch.ellipse)
            self.step += 1
        return self.metrics.sums.clone()

    def validate(self, loader: Loader, alpha: float) -> torch.Tensor:
        """Scores the averaged weights on the validation split; returns the metrics' sums."""
        self.evaluated.load_state_dict(self.averaged.values)
        return evaluate(self.evaluated, loader, self.metrics, self.criterion, alpha, self.autocast)

    def state(self) -> dict[str, Any]:
        """Returns all that a later process needs to go on after this epoch."""
        return {
            "format": STATE_FORMAT,
            "run": json.dumps(self.identity()),
            "epoch": self.epoch,
            "step": self.step,
            "model": plain_state_dict(self.model),
            "averaged": self.averaged.values,
            "averaged_steps": self.averaged.steps,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.random.get_state(),
            "history": json.dumps(self.history),
            "best": json.dumps(self.best),
        }

    def identity(self) -> dict[str, Any]:
        """Returns what must be the same for a run to go on where another stopped."""
        config: dict[str, Any] = json.loads(json.dumps(asdict(self.config)))
        del config["compile"]  # faster or slower, but the same run
        return {**config, "steps": self.total_steps, **self.card}

    def restore(self, path: Path) -> None:
        """Takes up a state written by `state`.

        Raises:
            CheckpointError: damaged, or of another network, configuration or data set.
        """
        state = load_tensors(path)
        if "averaged_steps" not in state:
            raise CheckpointError(
                f"{path} is not a training state; give the *_training_state.pt beside the model"
            )
        if state["format"] != STATE_FORMAT:
            raise CheckpointError(
                f"{path} has format {state['format']!r}, this version of pupilseg reads "
                f"{STATE_FORMAT}; upgrade pupilseg, or start anew without --resume"
            )
        stored = json.loads(state["run"])
        differ = [
            f"{key} {stored.get(key)!r} there, {value!r} here"
            for key, value in self.identity().items()
            if stored.get(key) != value
        ]
        if differ:
            raise CheckpointError(
                f"{path} belongs to another run ({'; '.join(differ)}); resume with the same flags "
                "and data, or start anew in another --output-dir"
            )
        load_weights(self.model, state["model"], path)
        self.averaged.values = {
            name: value.to(self.device) for name, value in state["averaged"].items()
        }
        self.averaged.steps = state["averaged_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.random.set_state(state["random"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history, self.best = json.loads(state["history"]), json.loads(state["best"])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    metrics: EpochMetrics,
    criterion: Callable[..., dict[str, torch.Tensor]],
    alpha: float,
    autocast: Mapping[str, Any],
) -> torch.Tensor:
    """Runs a network over a split; returns the metrics' sums, on the device."""
    model.eval()
    metrics.reset()
    for batch in _progress(loader, "validate"):
        with torch.autocast(**autocast):
            output = model(batch.image.contiguous(memory_format=torch.channels_last))
        losses = criterion(output, batch, alpha)
        metrics.update(losses, predicted_mask(output), batch.label, batch.ellipse)
    return metrics.sums.clone()


def fit(
    config: TrainConfig,
    train_loader: Loader,
    valid_loader: Loader,
    output_dir: Path,
    *,
    device: torch.device,
    card: Mapping[str, Any],
    resume: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> FitResult:
    """Trains a network and leaves its checkpoints in `output_dir`.

    Args:
        config: what to train and how.
        train_loader: shuffled batches; its epoch is set from here.
        valid_loader: batches in order.
        output_dir: where the files of `CHECKPOINT_NAMES` go.
        device: from `pupilseg.device.find_device`.
        card: what the model files say of the data: preprocessing, source, licence.
        resume: a `*_training_state.pt` to go on from.
        on_epoch: called with each epoch's row, and train_seconds and valid_seconds.

    Raises:
        CheckpointError: `resume` does not fit this run.
        OutputError: the output cannot be written.
        UsageError: unknown model, or nothing to train on.
    """
    if len(train_loader) == 0 or len(valid_loader) == 0:
        raise UsageError(
            f"{len(train_loader)} training and {len(valid_loader)} validation batches of "
            f"{config.batch_size}: give more frames or a smaller --batch-size"
        )
    run = Run(config, device, len(train_loader) * config.epochs, card)
    names = CHECKPOINT_NAMES[config.model]
    if resume is not None:
        run.restore(resume)
        _bring_best(resume.parent / names.best, output_dir / names.best)
        log.info("resumed %s after epoch %d", resume, run.epoch)
    if device.type == "cuda" and config.compile:
        run.model.compile(mode="max-autotune")
    interrupted, complete = False, run.epoch
    try:
        while run.epoch < config.epochs:
            row, seconds = _epoch(run, train_loader, valid_loader)
            improved = not run.best or row["valid_iou"] > run.best["valid_iou"]
            if improved:
                run.best = row
            _write(run, output_dir, improved=improved)
            complete = run.epoch
            if on_epoch is not None:
                on_epoch({**row, **seconds})
    except KeyboardInterrupt:
        if complete == 0:
            raise
        interrupted = True
    return FitResult(output_dir / names.best, run.best, run.history, interrupted)


def _epoch(
    run: Run, train_loader: Loader, valid_loader: Loader
) -> tuple[dict[str, float], dict[str, float]]:
    """Trains and validates one epoch; returns its row, and the seconds that both took."""
    started = time.perf_counter()
    alpha = alpha_schedule(run.epoch, run.config.epochs)
    train_sums = run.train_epoch(train_loader, alpha)
    trained = time.perf_counter()
    valid_sums = run.validate(valid_loader, alpha)
    sums = torch.stack([train_sums, valid_sums]).tolist()
    seconds = {
        "train_seconds": trained - started,
        "valid_seconds": time.perf_counter() - trained,
    }
    run.epoch += 1
    row = {
        "epoch": run.epoch,
        "lr": learning_rate(run.step - 1, run.total_steps, run.config.lr, run.config.warmup),
        "alpha": alpha,
        **scores(run.metrics.names, sums[0], "train"),
        **scores(run.metrics.names, sums[1], "valid"),
    }
    if not math.isfinite(row["train_loss"]):
        raise UsageError(
            f"the training loss is {row['train_loss']} after epoch {run.epoch}; lower --lr "
            f"({run.config.lr:g})"
        )
    run.history.append(row)
    return row, seconds


def _bring_best(there: Path, here: Path) -> None:
    """Copies the best model so far beside a run that goes on in another directory."""
    if there.exists() and not here.exists():
        with atomic_path(here) as temporary:
            shutil.copyfile(there, temporary)


def _write(run: Run, output_dir: Path, *, improved: bool) -> None:
    """Writes the checkpoints that an epoch's end asks for."""
    names = CHECKPOINT_NAMES[run.config.model]
    row = run.history[-1]
    numbered = improved if names.every == 0 else run.epoch % names.every == 0
    if improved or numbered or run.epoch == run.config.epochs:
        weights = plain_state_dict(run.evaluated)
        full_card = {
            "model": run.config.model,
            "architecture": run.config.architecture,
            "epoch": run.epoch,
            # JSON has no NaN, which is what an epoch without any pupil has for its centre.
            "metrics": {
                k: v for k, v in row.items() if k.startswith("valid_") and math.isfinite(v)
            },
            "config": asdict(run.config),
            **run.card,
        }
        if improved:
            save_model(output_dir / names.best, weights, full_card)
        if numbered or (names.every and run.epoch == run.config.epochs):
            name = names.epoch.format(epoch=run.epoch, miou=row["valid_iou"])
            save_model(output_dir / name, weights, full_card)
    write_history(output_dir / names.history, run.history)
    save_state(output_dir / names.state, run.state())


def _progress(loader: Loader, description: str) -> Any:
    """Wraps a loader in a bar that shows on a terminal only."""
    return tqdm(loader, description, leave=False, disable=None, unit="batch", dynamic_ncols=True)
