"""Cross-entropy with extra weight near the pupil's boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


def weighted_cross_entropy(z: Tensor, label: Tensor, spatial_weights: Tensor) -> Tensor:
    """Returns the mean of CE * (1 + spatial_weights) over all pixels.

    Args:
        z: logit of pupil minus logit of background. With two classes, softmax depends on this
            difference alone, which takes half the passes over memory of a form with two channels.
        label: 0 or 1, of any dtype that multiplies a float.
        spatial_weights: float, >= 0.

    Shape:
        z, label, spatial_weights: (N, H, W). Output: a scalar.

    Reference:
        RITnet, `train.py`: CE * (1 + edge weights).
    """
    pointwise = functional.softplus(z) - z * label
    return torch.addcmul(pointwise, pointwise, spatial_weights).mean()
