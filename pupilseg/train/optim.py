"""Learning rate schedule, optimizer groups and averaged weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Returns a step's learning rate: linear warm-up, then half a cosine down to 1 % of the peak.

    A pure function of the step, so that a resumed run has no schedule state to restore.

    Args:
        step: counted from 0.
        steps: number of steps in the run.
        peak: highest rate.
        warmup: share of the steps over which the rate rises.
    """
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns optimizer groups with weight decay for matrices and kernels only."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": kernels, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads an optimizer's state in the memory layout of its parameters.

    Fused kernels ignore strides, so they would combine the contiguous moments of a file with the
    wrong elements of a channels_last kernel.
    """
    optimizer.load_state_dict(dict(state))
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


def scaler_state(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """Returns a gradient scaler's state with its two changing values as tensors on the device.

    `GradScaler.state_dict` would read them, which makes the host wait for the device.
    """
    if not scaler.is_enabled() or scaler._scale is None:  # None: not used yet
        return scaler.state_dict()
    return {
        "scale": scaler._scale,
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
        "_growth_tracker": scaler._growth_tracker,
    }


def load_scaler(scaler: torch.amp.GradScaler, state: Mapping[str, Any]) -> None:
    """Loads a state from `scaler_state` or `GradScaler.state_dict`."""
    numbers = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    scaler.load_state_dict(numbers)


class WeightAverage:
    """Exponential moving average (EMA) of a network's weights and norm statistics.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the first, random weights do not
    hold back a short run.

    `torch.optim.swa_utils.AveragedModel(use_buffers=True, multi_avg_fn=...)` is not used, because
    it copies its step count to the device in every step, which waits on CUDA, and because its
    average starts at the weights after the first step instead of the initial weights.

    Args:
        model: the network in training, on its device.
        average: a network with the same weights and memory format, which will hold the average.
        decay: per step.

    Attributes:
        network: `average`; it is validated and saved.
        steps: number of updates.
    """

    def __init__(self, model: nn.Module, average: nn.Module, decay: float) -> None:
        self.network = average.requires_grad_(requires_grad=False)
        self.steps = 0
        self._decay = decay
        # The tensors are collected once, because walking through the modules takes 0.2 ms.
        current = model.state_dict()
        averaged = average.state_dict()
        floats = [name for name, value in averaged.items() if value.is_floating_point()]
        counts = [name for name in averaged if name not in floats]
        self._floats = [averaged[name] for name in floats]
        self._current_floats = [current[name] for name in floats]
        self._counts = [averaged[name] for name in counts]
        self._current_counts = [current[name] for name in counts]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average toward the model's current weights; integer counts are copied."""
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(self._floats, self._current_floats, 1 - decay)
        if self._counts:
            torch._foreach_copy_(self._counts, self._current_counts)


@torch.no_grad()
def copy_where(
    condition: Tensor, source: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> None:
    """Copies named tensors if a bool scalar on their device is true; the host does not read it."""
    for name, value in target.items():
        torch.where(condition, source[name], value, out=value)
