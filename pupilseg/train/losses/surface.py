"""Boundary loss: predicted probability weighted by signed distance to the true boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def surface_loss(probability: Tensor, dist_map: Tensor) -> Tensor:
    """Returns the mean over classes and pixels of probability * signed distance.

    Args:
        probability: of pupil, float in [0, 1].
        dist_map: signed distances to each class, normalized, class 0 first (`maps.distance_maps`).

    Shape:
        probability: (N, H, W). dist_map: (N, 2, H, W). Output: a scalar.

    Reference:
        Kervadec et al., MIDL 2019, eq. 5, over both classes as in RITnet (`loss.py`: SurfaceLoss).
    """
    background, pupil = dist_map.unbind(dim=1)
    # p * pupil + (1 - p) * background
    return torch.lerp(background, pupil, probability).mean() / 2
