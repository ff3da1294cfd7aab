"""The loss of segmentation networks: cross-entropy, Dice and surface loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pupilseg.train.losses.cross_entropy import weighted_cross_entropy
from pupilseg.train.losses.dice import generalized_dice_loss
from pupilseg.train.losses.surface import surface_loss

if TYPE_CHECKING:
    from torch import Tensor

    from pupilseg.loader.loader import Batch

SEGMENTATION_TERMS = ("loss", "ce_loss", "dice_loss", "surface_loss")
ALPHA_EPOCHS = 125
"""Most epochs over which alpha falls, as in RITnet (`train.py`)."""


def alpha_schedule(epoch: int, epochs: int) -> float:
    """Returns the weight of Dice against surface loss in an epoch.

    Args:
        epoch: counted from 0.
        epochs: length of the run.

    Returns:
        max(0, 1 - (epoch + 1) / min(epochs, 125)): falls linearly and stays at 0. RITnet returns
        to 1 after epoch 125 (docs/differences.md).
    """
    return max(0.0, 1.0 - (epoch + 1) / min(epochs, ALPHA_EPOCHS))


def segmentation_loss(logits: Tensor, batch: Batch, alpha: float | Tensor) -> dict[str, Tensor]:
    """Returns CE * (1 + w) + alpha * Dice + (1 - alpha) * surface, and its terms.

    Args:
        logits: of background and pupil, any float type.
        batch: the targets label, spatial_weights and dist_map.
        alpha: from `alpha_schedule`; a tensor on the logits' device avoids a copy to CUDA.

    Shape:
        logits: (N, 2, H, W). Output: scalars by the names of `SEGMENTATION_TERMS`.

    Reference:
        RITnet (Chaudhary et al., arXiv 1910.00694), `train.py`.
    """
    # Converted before the subtraction, which half precision would round, or overflow.
    z = logits[:, 1].float() - logits[:, 0].float()
    label = batch.label.to(z.dtype)
    probability = torch.sigmoid(z)
    cross_entropy = weighted_cross_entropy(z, label, batch.spatial_weights)
    dice = generalized_dice_loss(probability, label)
    surface = surface_loss(probability, batch.dist_map)
    return {
        "loss": cross_entropy + alpha * dice + (1 - alpha) * surface,
        "ce_loss": cross_entropy,
        "dice_loss": dice,
        "surface_loss": surface,
    }
