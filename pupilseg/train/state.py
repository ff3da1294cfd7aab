"""The state of a training run, which can be stored and resumed."""

from __future__ import annotations

import copy
import json
import logging
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from pupilseg.errors import CheckpointError
from pupilseg.model_files.card import UNKNOWN, Provenance
from pupilseg.model_files.checkpoint import load_tensors, load_weights
from pupilseg.models import create_model, model_entry
from pupilseg.runtime.batch_norm import synchronize_norms
from pupilseg.runtime.distributed import ALONE, Ranks
from pupilseg.train.config import SPEED_ONLY, TrainConfig
from pupilseg.train.losses import LOSSES, alpha_schedule
from pupilseg.train.metrics import EpochMetrics, mean_iou
from pupilseg.train.optim import (
    WeightAverage,
    copy_where,
    learning_rate,
    load_optimizer,
    load_scaler,
    parameter_groups,
    scaler_state,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from pupilseg.runtime.device import Timestamp

log = logging.getLogger(__name__)

STATE_FORMAT = 2


class TrainState:
    """The complete state of a training run; `loop.fit` advances it.

    Args:
        config: the run's configuration.
        device: from `runtime.device.find_device`.
        total_steps: optimizer steps in the whole run.
        provenance: provenance of the weights, stored in every checkpoint.
        ranks: the processes of the job.
        notes: stored in the training state unchanged.
        initial: model file whose weights the run starts from; None for random ones.

    Attributes:
        model: the network in training.
        parameters: its parameters, as a list, because each step needs them twice and walking
            through the modules takes 0.2 ms.
        average: the average of its weights, which is validated and saved.
        optimizer, scaler, autocast: AdamW, the gradient scaler, and arguments of `torch.autocast`.
        random: generator of the augmentation.
        loss: function that maps (output, batch, alpha) to scalars by name.
        alphas: float32 (epochs,), the loss's alpha in each epoch, on the device.
        metrics: sums over the current epoch, on the device.
        rows: float64 (epochs, 2, sums), the sums of training and validation, on the device.
        best_iou: highest validation mIoU so far, a scalar on the device.
        best_epoch: its epoch, counted from 1, a scalar on the device.
        best_weights: the averaged weights of that epoch, on the device.
        laps: start of the current epoch, end of its training, end of its validation.
        schedules: (first epoch, number of epochs) of each schedule that the run has followed; more
            than one if a resumed run got more epochs.
        epoch: number of finished epochs.
        step: number of finished optimizer steps.

    Raises:
        CheckpointError: `initial` is damaged, or holds another network.
        UsageError: the model is unknown.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        total_steps: int,
        provenance: Provenance = UNKNOWN,
        ranks: Ranks = ALONE,
        notes: Mapping[str, str] | None = None,
        initial: Path | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config = config.resolved(device)
        self.device = device
        self.total_steps = total_steps
        self.provenance = provenance
        self.ranks = ranks
        self.notes = dict(notes or {})
        self.epoch = 0
        self.step = 0
        self.schedules = [(0, config.epochs)]
        self.laps: list[Timestamp] = []

        network = self._build_network()
        if initial is not None:
            load_weights(network, load_tensors(initial), initial)
        average = copy.deepcopy(network)
        self.model = synchronize_norms(network, ranks)
        self.parameters = list(self.model.parameters())
        self.average = WeightAverage(self.model, average, config.ema_decay)

        # On CUDA, only the fused form can skip a step with overflowed gradients without a host
        # synchronization. On a CPU, fused takes 4.0 ms per step and not fused 2.0 ms (130 weights,
        # 2 threads).
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=self.learning_rate(0),
            fused=fused,
            foreach=not fused,
        )
        dtype = autocast_dtype(config, device)
        self.autocast: dict[str, Any] = {
            "device_type": device.type,
            "dtype": dtype or torch.bfloat16,
            "enabled": dtype is not None,
        }
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        # Except on CUDA, augmentation runs on the CPU.
        generator_device = device if device.type == "cuda" else "cpu"
        self.random = torch.Generator(generator_device).manual_seed(config.seed)

        self.loss, terms = LOSSES[model_entry(config.model).task]
        # Created on the device once, because copying a number to it in each step would wait.
        alphas = [alpha_schedule(epoch, config.epochs) for epoch in range(config.epochs)]
        self.alphas = torch.tensor(alphas, device=device)
        self.metrics = EpochMetrics(terms, device)
        sums = self.metrics.sums
        self.rows = torch.zeros((config.epochs, 2, len(sums)), dtype=sums.dtype, device=device)
        self.best_iou = torch.full((), -1.0, dtype=sums.dtype, device=device)
        self.best_epoch = torch.zeros((), dtype=torch.int64, device=device)
        self.best_weights = {
            name: value.clone() for name, value in self.average.network.state_dict().items()
        }

    def _build_network(self) -> nn.Module:
        """Builds the network on the CPU, so that a seed gives the same weights on any device."""
        model = create_model(self.config.model, **self.config.architecture)
        if hasattr(model, "with_map"):  # the map is part of the validation loss
            model.with_map = True  # type: ignore[assignment]  # nn.Module types it as a tensor
        # On 2 CPU cores, a step takes 34 ms per frame in channels_last and 51 ms without.
        return model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]  # torch's stub lacks this form

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory layout of images and kernels."""
        return torch.channels_last if self.config.channels_last else torch.contiguous_format

    def learning_rate(self, step: int, total_steps: int | None = None) -> float:
        """Returns the learning rate of a step.

        Args:
            step: counted from 0.
            total_steps: length of the schedule; None for that of this run.
        """
        assert self.config.lr is not None  # the configuration is resolved
        steps = self.total_steps if total_steps is None else total_steps
        return learning_rate(step, steps, self.config.lr, self.config.warmup)

    def schedule_of(self, epoch: int) -> int:
        """Returns the number of epochs of the schedule that an epoch, counted from 0, followed."""
        return next(epochs for first, epochs in reversed(self.schedules) if first <= epoch)

    def end_epoch(self) -> None:
        """Sums the epoch's rows over the ranks, and keeps the weights if they are the best."""
        _, valid = self.ranks.sum_(self.rows[self.epoch])
        self.epoch += 1
        iou = mean_iou(self.metrics.names, valid)
        better = iou > self.best_iou
        self.best_iou = torch.where(better, iou, self.best_iou)
        self.best_epoch = torch.where(
            better, torch.full_like(self.best_epoch, self.epoch), self.best_epoch
        )
        copy_where(better, self.average.network.state_dict(), self.best_weights)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that is needed to resume after this epoch; tensors on the device."""
        return {
            "format": STATE_FORMAT,
            "run": json.dumps(self.identity()),
            "notes": json.dumps(self.notes),
            "epoch": self.epoch,
            "step": self.step,
            "schedules": json.dumps(self.schedules),
            "model": self.model.state_dict(),
            "averaged": self.average.network.state_dict(),
            "averaged_steps": self.average.steps,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler_state(self.scaler),
            "random": self.random.get_state(),
            "rows": self.rows,
            "best_iou": self.best_iou,
            "best_epoch": self.best_epoch,
            "best": self.best_weights,
        }

    def identity(self) -> dict[str, Any]:
        """Returns the values that must be the same when a run is resumed."""
        config = _as_json(self.config)
        for name in SPEED_ONLY:
            del config[name]
        return {**config, "steps": self.total_steps, **self.provenance.to_dict()}

    def restore(self, path: Path) -> dict[str, Any]:
        """Loads a training state from a file and returns the file's content.

        Raises:
            CheckpointError: the file is damaged, or belongs to another network, configuration or
                data set, or to a run of more epochs.
        """
        stored = read_state(path)
        self._restore_schedules(stored, path)
        load_weights(self.model, stored["model"], path)
        load_weights(self.average.network, stored["averaged"], path)
        self.average.steps = stored["averaged_steps"]
        for name, value in self.best_weights.items():
            value.copy_(stored["best"][name])
        load_optimizer(self.optimizer, stored["optimizer"])
        load_scaler(self.scaler, stored["scaler"])
        self.random.set_state(stored["random"])
        self.rows[: len(stored["rows"])].copy_(stored["rows"])
        self.best_iou.copy_(stored["best_iou"])
        self.best_epoch.copy_(stored["best_epoch"])
        self.epoch = stored["epoch"]
        self.step = stored["step"]
        return stored

    def _restore_schedules(self, stored: Mapping[str, Any], path: Path) -> None:
        """Restores the schedules, and adds that of this run if it has more epochs.

        Raises:
            CheckpointError: the stored run differs in more than its number of epochs, or has more.
        """
        # A field that is missing in an older file had its default value.
        before = {**_as_json(TrainConfig()), **json.loads(stored["run"])}
        now = self.identity()
        epochs, longer = before["epochs"], self.config.epochs
        if longer > epochs and before["steps"] % epochs == 0:
            before["steps"] = before["steps"] // epochs * longer
            before["epochs"] = longer
        differences = [
            f"{key} is {before.get(key)!r} in the file and {value!r} now"
            for key, value in now.items()
            if before.get(key) != value
        ]
        if differences:
            init = ""
            if before["model"] == self.config.model:
                best = path.with_name(model_entry(self.config.model).best_file)
                init = f", from its weights: --init {shlex.quote(str(best))}"
            raise CheckpointError(
                f"{path} belongs to another run ({'; '.join(differences)}); resume with the same "
                f"flags and data, or start a new run in another directory{init}"
            )
        if "schedules" in stored:
            self.schedules = json.loads(stored["schedules"])
        else:  # written by an earlier version
            self.schedules = [(0, epochs)]
        if longer > epochs:
            self.schedules.append((stored["epoch"], longer))
            log.info(
                "resuming after epoch %d with %d epochs instead of %d: the learning rate continues "
                "at %.3g, from step %d of the longer schedule",
                stored["epoch"],
                longer,
                epochs,
                self.learning_rate(stored["step"]),
                stored["step"],
            )


def _as_json(config: TrainConfig) -> dict[str, Any]:
    """Returns a configuration as JSON stores it, with lists for tuples."""
    stored: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return stored


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Returns the type of mixed precision; None to compute in float32."""
    if not config.amp:
        return None
    if config.amp_dtype != "auto":
        found: torch.dtype = getattr(torch, config.amp_dtype)
        return found
    if device.type != "cuda":
        return None
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def read_state(path: Path) -> dict[str, Any]:
    """Reads a training state to the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or not a training state.
    """
    state = load_tensors(path)
    if "averaged_steps" not in state:
        raise CheckpointError(
            f"{path} is not a training state; pass the *_training_state.pt beside the model"
        )
    if state["format"] != STATE_FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']!r}, and this version of pupilseg reads format "
            f"{STATE_FORMAT}; upgrade pupilseg, or start a new run without --resume"
        )
    return state


def notes_of(path: Path) -> dict[str, str]:
    """Returns the notes in a training state.

    Raises:
        CheckpointError: as `read_state`.
    """
    notes: dict[str, str] = json.loads(read_state(path)["notes"])
    return notes
