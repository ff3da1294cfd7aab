"""Learning rate, parameter groups and averaged weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Returns the rate of a step: linear warm-up, then half a cosine down to 1 % of the peak.

    A pure function of the step: a resumed run has no schedule state to restore.

    Args:
        step: from 0.
        steps: of the whole run.
        peak: highest rate.
        warmup: share of the steps over which the rate rises.
    """
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits parameters: matrices and kernels decay, biases and norms do not."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": kernels, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Takes up an optimizer's state, in the memory layout of the parameters.

    Fused kernels walk through memory and do not look at strides: with the contiguous moments of a
    file beside channels_last kernels they would pair the wrong numbers.
    """
    optimizer.load_state_dict(dict(state))
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


class AveragedWeights:
    """Exponential moving average of weights and norm statistics (EMA), with a warm start.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that a short run is not held back by
    its first, random weights.

    Args:
        model: on its device, in its memory format; its tensors are looked up once, here.
        decay: of a step.

    Attributes:
        flat: float32 (weights and statistics,), all averages in one vector.
        values: name -> view of `flat`; whole numbers (batch counts) beside it.
        steps: how often the average has moved.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        state = {name: value.detach() for name, value in model.state_dict().items()}
        floats = {name: value for name, value in state.items() if value.is_floating_point()}
        self.flat = torch.cat([_in_memory_order(value) for value in floats.values()])
        self._current = list(floats.values())
        self._names = list(floats)
        self._averages = self._views(self.flat)
        counts = {name: value for name, value in state.items() if name not in floats}
        self._current_counts = list(counts.values())
        self._counts = {name: value.clone() for name, value in counts.items()}
        self.values = self.named(self.flat)

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Returns a vector such as `flat` as tensors of the model's shapes."""
        views, start = [], 0
        for value in self._current:
            # Strides as the model's: only then is the update below one kernel on CUDA.
            views.append(flat.as_strided(value.shape, value.stride(), start))
            start += value.numel()
        return views

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns a vector such as `flat` as a `state_dict` of views of it."""
        return {**dict(zip(self._names, self._views(flat), strict=True)), **self._counts}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor], steps: int) -> None:
        """Takes up averages that `values` and `steps` gave."""
        self.load_flat(self.flat, values)
        for name, count in self._counts.items():
            count.copy_(values[name])
        self.steps = steps

    @torch.no_grad()
    def load_flat(self, flat: Tensor, values: Mapping[str, Tensor]) -> None:
        """Writes named tensors into a vector such as `flat`."""
        for name, view in zip(self._names, self._views(flat), strict=True):
            view.copy_(values[name])

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model's current weights."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(self._averages, self._current, 1 - decay)
        if self._counts:
            torch._foreach_copy_(list(self._counts.values()), self._current_counts)


def _in_memory_order(value: Tensor) -> Tensor:
    """Returns a dense tensor's numbers as they lie in memory, whatever its memory format."""
    return value.as_strided((value.numel(),), (1,))
