"""Learning rate, parameter groups and averaged weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


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


class AveragedWeights:
    """Exponential moving average of weights and norm statistics (EMA), with a warm start.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that a short run is not held back by
    its first, random weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the current weights."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        current = model.state_dict()
        floats = [name for name, value in self.values.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.values[name] for name in floats],
            [current[name].detach() for name in floats],
            1 - decay,
        )
        for name in self.values.keys() - set(floats):
            self.values[name].copy_(current[name])
