"""What a training run carries from step to step, and from process to process."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from pupilseg.errors import CheckpointError
from pupilseg.model_files.checkpoint import load_tensors, load_weights
from pupilseg.models import create_model, model_entry
from pupilseg.runtime.distributed import ALONE, Ranks, synchronise_norms
from pupilseg.train.config import SPEED_ONLY
from pupilseg.train.losses import (
    ELLIPSE_TERMS,
    SEGMENTATION_TERMS,
    alpha_schedule,
    ellipse_loss,
    segmentation_loss,
)
from pupilseg.train.metrics import EpochMetrics, mean_iou
from pupilseg.train.optim import AveragedWeights, load_optimizer, parameter_groups

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from pupilseg.train.config import TrainConfig

STATE_FORMAT = 2


class Run:
    """State of one training run; `engine.fit` drives it.

    Args:
        config: see `TrainConfig`.
        device: from `pupilseg.runtime.device.find_device`.
        total_steps: optimizer steps in the whole run.
        card: what the run's files say of its data.
        ranks: the processes of the job.
        notes: kept in the training state as they are.

    Attributes:
        model: in training.
        parameters: its parameters.
        averaged: its averaged weights, which are validated and saved.
        evaluated: a network to hold the averaged weights.
        rows: float64 (epochs, 2, sums), of training and validation, on the device.
        best_iou, best_epoch, best_flat: highest validation mIoU so far, the epoch (from 1) and its
            weights, on the device; which epoch that is, the host need not know.
        epoch: whole epochs behind.
        step: optimizer steps behind.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        total_steps: int,
        card: Mapping[str, Any],
        ranks: Ranks = ALONE,
        notes: Mapping[str, str] | None = None,
        initial: Path | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device, self.total_steps = config, device, total_steps
        self.card, self.ranks, self.notes = dict(card), ranks, dict(notes or {})
        segments = model_entry(config.model).task == "segmentation"
        self.criterion = segmentation_loss if segments else ellipse_loss
        network = self._network()
        if initial is not None:
            load_weights(network, load_tensors(initial), initial)
        self.model = synchronise_norms(network, ranks, device)
        # Walking through the modules takes 0.2 ms, and a step wants them twice.
        self.parameters = list(self.model.parameters())
        self.evaluated = self._network()
        self.averaged = AveragedWeights(self.model, config.ema_decay)
        # Fused is on CUDA the only form that can skip a step whose gradients overflowed without
        # asking the host; on a CPU it takes 4.0 ms a step, the other 2.0 (130 weights, 2 threads).
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.lr,
            fused=fused,
            foreach=not fused,
        )
        cuda = device.type == "cuda" and config.amp
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.autocast: dict[str, Any] = {
            "device_type": device.type,
            "dtype": torch.bfloat16 if bf16 or not cuda else torch.float16,
            "enabled": cuda,
        }
        self.scaler = torch.amp.GradScaler(device.type, enabled=cuda and not bf16)
        # What is not CUDA augments on the host.
        drawn_on = device if device.type == "cuda" else "cpu"
        self.random = torch.Generator(drawn_on).manual_seed(config.seed)
        self.metrics = EpochMetrics(SEGMENTATION_TERMS if segments else ELLIPSE_TERMS, device)
        sums = self.metrics.sums
        self.rows = torch.zeros((config.epochs, 2, len(sums)), dtype=sums.dtype, device=device)
        # On the device from the start: a number copied there in a step would be waited for.
        alphas = [alpha_schedule(epoch, config.epochs) for epoch in range(config.epochs)]
        self.alphas = torch.tensor(alphas, device=device)
        self.best_iou = torch.full((), -1.0, dtype=sums.dtype, device=device)
        self.best_epoch = torch.zeros((), dtype=torch.int64, device=device)
        self.best_flat = self.averaged.flat.clone()
        self.epoch, self.step = 0, 0

    def _network(self) -> nn.Module:
        """Builds the network on the CPU, so that a seed gives the same weights on any device."""
        model = create_model(self.config.model, **self.config.architecture)
        if hasattr(model, "with_map"):  # its map is part of the validation loss
            model.with_map = True  # type: ignore[assignment]  # nn.Module types it as a tensor
        # Measured on 2 CPU cores: a training step takes 34 ms a frame in this layout, 51 without.
        return model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]  # torch's stub lacks this form

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of images and kernels."""
        return torch.channels_last if self.config.channels_last else torch.contiguous_format

    def end_epoch(self) -> None:
        """Sums the epoch's rows over the ranks and keeps the best weights, on the device."""
        row = self.ranks.sum_(self.rows[self.epoch])
        self.epoch += 1
        iou = mean_iou(self.metrics.names, row[1])
        better = iou > self.best_iou
        self.best_iou = torch.where(better, iou, self.best_iou)
        now = torch.full_like(self.best_epoch, self.epoch)
        self.best_epoch = torch.where(better, now, self.best_epoch)
        self.best_flat = torch.where(better, self.averaged.flat, self.best_flat)

    def state(self) -> dict[str, Any]:
        """Returns all that a later process needs to go on after this epoch, on the device."""
        return {
            "format": STATE_FORMAT,
            "run": json.dumps(self.identity()),
            "notes": json.dumps(self.notes),
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "averaged": self.averaged.values,
            "averaged_steps": self.averaged.steps,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.random.get_state(),
            "rows": self.rows,
            "best_iou": self.best_iou,
            "best_epoch": self.best_epoch,
            "best": self.averaged.named(self.best_flat),
        }

    def identity(self) -> dict[str, Any]:
        """Returns what must be the same for a run to go on where another stopped."""
        config: dict[str, Any] = json.loads(json.dumps(asdict(self.config)))
        for name in SPEED_ONLY:
            del config[name]
        return {**config, "steps": self.total_steps, **self.card}

    def restore(self, path: Path) -> dict[str, Any]:
        """Takes up a state written from `state`; returns it.

        Raises:
            CheckpointError: damaged, or of another network, configuration or data set.
        """
        state = read_state(path)
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
        self.averaged.load(state["averaged"], state["averaged_steps"])
        self.averaged.load_flat(self.best_flat, state["best"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.random.set_state(state["random"])
        for name in ("rows", "best_iou", "best_epoch"):
            getattr(self, name).copy_(state[name])
        self.epoch, self.step = state["epoch"], state["step"]
        return state


def read_state(path: Path) -> dict[str, Any]:
    """Returns what a training state holds, on the CPU.

    Raises:
        CheckpointError: missing, damaged, not a training state, or of another format.
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
    return state


def notes_of(path: Path) -> dict[str, str]:
    """Returns the notes in a training state.

    Raises:
        CheckpointError: as `read_state`.
    """
    notes: dict[str, str] = json.loads(read_state(path)["notes"])
    return notes
