"""The loss of segmentation networks: cross-entropy, Dice and surface loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

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
        logits: logits of background and pupil, any float dtype.
        batch: the targets label, spatial_weights and dist_map.
        alpha: from `alpha_schedule`; a tensor on the logits' device avoids a copy to CUDA.

    Shape:
        logits: (N, 2, H, W). Output: scalars by the names of `SEGMENTATION_TERMS`.

    Reference:
        RITnet (Chaudhary et al., arXiv 1910.00694), `train.py`.
    """
    # Converted before the subtraction, which would round or overflow in half precision.
    z = logits[:, 1].float() - logits[:, 0].float()
    cross_entropy, dice, surface = segmentation_terms(
        z, batch.label, batch.spatial_weights, batch.dist_map
    )
    return {
        "loss": cross_entropy + alpha * dice + (1 - alpha) * surface,
        "ce_loss": cross_entropy,
        "dice_loss": dice,
        "surface_loss": surface,
    }


def segmentation_terms(
    z: Tensor, label: Tensor, spatial_weights: Tensor, dist_map: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the three terms, with p = sigmoid(z) the probability of pupil.

    - Cross-entropy: the mean over pixels of CE * (1 + spatial_weights).
    - Generalized Dice: 1 - 2 * intersection / union, averaged over frames, where each class has the
      weight 1 / (its pixels)^2. A class without pixels has the weight 0, where the formula would
      divide by zero: a blink is scored on background alone.
    - Surface: the mean over classes and pixels of probability * signed distance.

    Their gradients are implemented by hand, which takes 3.9 ms per frame on a CPU core; autograd
    takes 5.2 ms, because it stores and reads every intermediate result.

    Args:
        z: logit of pupil minus logit of background. With two classes, softmax depends on this
            difference alone.
        label: 0 or 1, any type.
        spatial_weights: at least 0.
        dist_map: signed distances to each class, normalized, class 0 first (`maps.distance_maps`).

    Shape:
        z, label, spatial_weights: (N, H, W). dist_map: (N, 2, H, W). Output: three scalars.

    Reference:
        RITnet, `train.py` (cross-entropy with edge weights); Sudre et al., arXiv 1707.03237
        (generalized Dice); Kervadec et al., MIDL 2019, eq. 5, over both classes as in RITnet
        (`loss.py`: SurfaceLoss).
    """
    terms: tuple[Tensor, Tensor, Tensor] = _Terms.apply(
        z, label.to(z.dtype), spatial_weights.to(z.dtype), dist_map.to(z.dtype)
    )
    return terms


class _Terms(torch.autograd.Function):
    """Maps (z, label, spatial_weights, dist_map), all of one float type, to the three terms."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, label: Tensor, weights: Tensor, dist_map: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        frames, total = len(z), z.numel()
        pixels = float(total // frames)
        p = torch.sigmoid(z)
        pointwise = functional.softplus(z).addcmul_(z, label, value=-1)
        cross_entropy = pointwise.addcmul_(pointwise, weights).mean()

        true_pupil = label.sum(dim=(1, 2))
        predicted = p.sum(dim=(1, 2))
        overlap = torch.mul(p, label, out=pointwise).sum(dim=(1, 2))
        true_background = pixels - true_pupil
        overlap_background = pixels - predicted - true_pupil + overlap
        weight_pupil = (true_pupil > 0) / true_pupil.clamp(min=1).square()
        weight_background = (true_background > 0) / true_background.clamp(min=1).square()
        intersection = weight_pupil * overlap + weight_background * overlap_background
        union = weight_pupil * (predicted + true_pupil) + weight_background * (
            2 * pixels - predicted - true_pupil
        )
        dice = (1 - 2 * intersection / union).mean()

        background, pupil = dist_map.unbind(dim=1)
        slope = pupil - background  # the surface loss is linear in p
        surface = torch.addcmul(background, p, slope, out=pointwise).mean() / 2

        # d dice / d p is an affine function of the label in each frame.
        per_label = -2 * (weight_pupil + weight_background) / (union * frames)
        constant = (
            2 * weight_background / union
            + 2 * intersection * (weight_pupil - weight_background) / union.square()
        )
        ctx.save_for_backward(p, label, weights, slope, per_label, constant / frames)
        return cross_entropy, dice, surface

    @staticmethod
    def backward(
        ctx: Any, grad_cross_entropy: Tensor, grad_dice: Tensor, grad_surface: Tensor
    ) -> tuple[Tensor, None, None, None]:
        p, label, weights, slope, per_label, constant = ctx.saved_tensors
        grad = torch.addcmul(
            (constant * grad_dice)[:, None, None], label, (per_label * grad_dice)[:, None, None]
        )
        grad = torch.addcmul(grad, slope, grad_surface / (2 * p.numel()))
        grad *= torch.addcmul(p, p, p, value=-1)  # d p / d z
        error = p - label
        error.addcmul_(error, weights)
        grad.addcmul_(error, grad_cross_entropy / p.numel())
        return grad, None, None, None
