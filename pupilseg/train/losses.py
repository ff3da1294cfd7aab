"""Training losses: weighted cross-entropy, generalised Dice and surface loss; ellipse regression.

All arithmetic is float32 or wider, whatever the network computes in: sums over 256,000 pixels lose
their small terms in half precision. With two classes, softmax depends on z = logit 1 - logit 0
alone, so everything is written in z: half the passes over memory of the form with two channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pupilseg.train.metrics import ellipse_px

if TYPE_CHECKING:
    from torch import Tensor

    from pupilseg.loader.loader import Batch
    from pupilseg.models.ellipse import EllipseOutput

SEGMENTATION_TERMS = ("loss", "ce_loss", "dice_loss", "surface_loss")
ELLIPSE_TERMS = ("loss", "ce_loss", "dice_loss", "center_loss", "radius_loss")
ALPHA_EPOCHS = 125
"""Longest run over which alpha falls, as in RITnet (`train.py`)."""
COVER_CE_WEIGHT = 10.0
"""Of the map's cross-entropy against its Dice: a mean over 16,000 cells of which 300 are pupil."""


def alpha_schedule(epoch: int, epochs: int) -> float:
    """Returns the weight of Dice against surface loss for an epoch.

    Args:
        epoch: from 0.
        epochs: length of the run.

    Returns:
        1 - (epoch + 1) / min(epochs, 125), never below 0: falls linearly and stays at 0 (RITnet
        goes back to 1 after epoch 125; docs/differences.md).
    """
    return max(0.0, 1.0 - (epoch + 1) / min(epochs, ALPHA_EPOCHS))


def cross_entropy(z: Tensor, label: Tensor, spatial_weights: Tensor) -> Tensor:
    """Returns the mean of CE * (1 + spatial_weights) over all pixels.

    Args:
        z: float (N, H, W), logit of pupil minus logit of background.
        label: (N, H, W) of {0, 1}, any dtype that multiplies a float.
        spatial_weights: float (N, H, W), >= 0.

    Source: RITnet `train.py`, whose loss is CE * (1 + edge weights).
    """
    pointwise = functional.softplus(z) - z * label
    return torch.addcmul(pointwise, pointwise, spatial_weights).mean()


def generalised_dice(probability: Tensor, label: Tensor) -> Tensor:
    """Returns 1 - generalised Dice, averaged over frames.

    Sudre et al., arXiv 1707.03237, GDL: classes weighted by 1 / (pixels of the class)^2, in each
    frame. A class that the frame does not show has no weight: a blink is scored on background
    alone, where the formula would divide by zero.

    Args:
        probability: float (N, H, W), probability of pupil.
        label: float (N, H, W) of {0, 1}.
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


def surface(probability: Tensor, dist_map: Tensor) -> Tensor:
    """Returns the boundary loss: mean over classes and pixels of probability * signed distance.

    Kervadec et al., MIDL 2019, eq. 5, over both classes as in RITnet (`loss.py: SurfaceLoss`).

    Args:
        probability: float (N, H, W), probability of pupil.
        dist_map: float (N, 2, H, W), signed normalised distances, class 0 first.
    """
    background, pupil = dist_map.unbind(dim=1)
    # p * d1 + (1 - p) * d0
    return torch.lerp(background, pupil, probability).mean() / 2


def segmentation_loss(logits: Tensor, batch: Batch, alpha: float | Tensor) -> dict[str, Tensor]:
    """Returns the total and its parts: CE * (1 + w) + alpha * Dice + (1 - alpha) * surface.

    Args:
        logits: (N, 2, 400, 640), any float type.
        batch: the targets.
        alpha: from `alpha_schedule`; a scalar tensor spares CUDA a copy.

    Returns:
        Scalars under the names of `SEGMENTATION_TERMS`; "loss" carries the gradient.
    """
    z = logits[:, 1].float() - logits[:, 0].float()  # half precision would round, or overflow
    label = batch.label.to(z.dtype)
    probability = torch.sigmoid(z)
    ce = cross_entropy(z, label, batch.spatial_weights)
    dice = generalised_dice(probability, label)
    boundary = surface(probability, batch.dist_map)
    total = ce + alpha * dice + (1 - alpha) * boundary
    return dict(zip(SEGMENTATION_TERMS, (total, ce, dice, boundary), strict=True))


def cover_loss(cover: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cross-entropy and Dice loss of a map of cells, averaged over frames.

    The target of a cell is the share of it that is pupil. Cross-entropy is the mean over cells, so
    a perfect map has the entropy of the cells on the boundary, not 0. Dice is that of V-Net
    (Milletari et al., arXiv 1606.04797, squares in the denominator), which is 0 for a perfect map
    of shares too; a frame without a pupil adds 0 to it.

    Args:
        cover: (N, h, w) logits of the share.
        label: (N, H, W) of {0, 1}; H, W are multiples of h, w.
    """
    cell = (label.shape[1] // cover.shape[1], label.shape[2] // cover.shape[2])
    target = functional.avg_pool2d(label[:, None].to(cover.dtype), cell)[:, 0]
    ce = functional.binary_cross_entropy_with_logits(cover, target)
    share = torch.sigmoid(cover)
    overlap = (share * target).sum(dim=(1, 2))
    size = target.square().sum(dim=(1, 2))
    total = share.square().sum(dim=(1, 2)) + size
    dice = (1 - 2 * overlap / total.clamp(min=1e-6)) * (size > 0)
    return ce, dice.mean()


def ellipse_loss(output: EllipseOutput, batch: Batch, alpha: float | Tensor) -> dict[str, Tensor]:
    """Returns the total and its parts: the map's cross-entropy and Dice, and the four numbers'.

    The numbers are the map's moments, and the map alone is trained on: a frame whose darkest patch
    is not its pupil would pull the centre of the wrong patch, and each weight of the numbers that
    was tried made them worse (docs/benchmarks.md). Their own losses, smooth L1 in units of 10 px
    over frames with a pupil, 0 for the others, are measured all the same.

    Args:
        output: what the network gives in training mode, or with `with_map`.
        batch: the targets.
        alpha: not used; every loss of the loop takes it.

    Returns:
        Scalars under the names of `ELLIPSE_TERMS`, means over frames; "loss" carries the gradient.
    """
    del alpha
    ce, dice = cover_loss(output.cover.float(), batch.label)
    error = functional.smooth_l1_loss(
        ellipse_px(output.ellipse.detach()) / 10, ellipse_px(batch.ellipse) / 10, reduction="none"
    )
    has_pupil = (batch.ellipse[:, 2] > 0).to(error.dtype)
    center = (error[:, :2].sum(dim=1) * has_pupil).mean()
    radius = (error[:, 2:].sum(dim=1) * has_pupil).mean()
    total = COVER_CE_WEIGHT * ce + dice
    return dict(zip(ELLIPSE_TERMS, (total, ce, dice, center, radius), strict=True))
