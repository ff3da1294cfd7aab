"""Generalized Dice loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def generalized_dice_loss(probability: Tensor, label: Tensor) -> Tensor:
    """Returns 1 - generalized Dice, averaged over frames.

    In each frame, a class has the weight 1 / (its pixels)^2. A class without pixels has the weight
    0, where the formula would divide by zero: a blink is scored on background alone.

    Args:
        probability: of pupil, float in [0, 1].
        label: 0 or 1, float.

    Shape:
        probability, label: (N, H, W). Output: a scalar.

    Reference:
        Sudre et al., arXiv 1707.03237, GDL.
    """
    pixels = float(label[0].numel())
    true_pupil = label.sum(dim=(1, 2))
    predicted = probability.sum(dim=(1, 2))
    overlap = (probability * label).sum(dim=(1, 2))
    true_background = pixels - true_pupil
    overlap_background = pixels - predicted - true_pupil + overlap
    weight_pupil = (true_pupil > 0) / true_pupil.clamp(min=1).square()
    weight_background = (true_background > 0) / true_background.clamp(min=1).square()
    intersection = weight_pupil * overlap + weight_background * overlap_background
    union = weight_pupil * (predicted + true_pupil) + weight_background * (
        2 * pixels - predicted - true_pupil
    )
    return (1 - 2 * intersection / union).mean()
