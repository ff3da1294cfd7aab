"""Training losses: weighted cross-entropy, generalised Dice and surface loss; ellipse regression.

All arithmetic is float32 or wider, whatever the network computes in: sums over 256,000 pixels lose
their small terms in half precision. With two classes, softmax depends on z = logit 1 - logit 0
alone, so everything is written in z: half the passes over memory of the form with two channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pupilseg.metrics import ellipse_px

if TYPE_CHECKING:
    from torch import Tensor

    from pupilseg.loader import Batch
    from pupilseg.models.ellipse import EllipseOutput

SEGMENTATION_TERMS = ("loss", "ce_loss", "dice_loss", "surface_loss")
ELLIPSE_TERMS = ("loss", "center_loss", "radius_loss", "heat_loss")
ALPHA_EPOCHS = 125
"""Longest run over which alpha falls, as in RITnet (`train.py`)."""
RADIUS_WEIGHT = 2.0
"""A pixel of radius error counts as two of centre error: centre spans 640 px, radii some 60."""


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


def segmentation_loss(logits: Tensor, batch: Batch, alpha: float) -> dict[str, Tensor]:
    """Returns the total and its parts: CE * (1 + w) + alpha * Dice + (1 - alpha) * surface.

    Args:
        logits: (N, 2, 400, 640), any float type.
        batch: the targets.
        alpha: from `alpha_schedule`.

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


def heat_loss(log_heat: Tensor, label: Tensor, has_pupil: Tensor) -> Tensor:
    """Returns how far a heat map is from the pupil, averaged over the frames that have one.

    Cross-entropy against a target that is uniform over the pupil's pixels, counted per cell, less
    the target's entropy, so that 0 is perfect (Kullback-Leibler divergence; DSNT section 3.4
    compares distributions likewise).

    Args:
        log_heat: (N, h, w) log-probabilities that sum to one over the cells.
        label: (N, H, W) of {0, 1}; H, W are multiples of h, w.
        has_pupil: float (N,) of {0, 1}.
    """
    cell = (label.shape[1] // log_heat.shape[1], label.shape[2] // log_heat.shape[2])
    share = functional.avg_pool2d(label[:, None].to(log_heat.dtype), cell)[:, 0]
    target = share / share.sum(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    divergence = torch.xlogy(target, target) - target * log_heat
    return (divergence.sum(dim=(1, 2)) * has_pupil).sum() / has_pupil.sum().clamp(min=1)


def ellipse_loss(output: Tensor | EllipseOutput, batch: Batch, alpha: float) -> dict[str, Tensor]:
    """Returns the total and its parts: smooth L1 of centre and semi-axes in units of 10 px, heat.

    A frame without a pupil asks for semi-axes of zero and says nothing of the centre.

    Args:
        output: what the network gives in training mode, or (N, 4) normalised cx, cy, rx, ry.
        batch: the targets.
        alpha: not used; every loss of the loop takes it.

    Returns:
        Scalars under the names of `ELLIPSE_TERMS`; "loss" carries the gradient. In evaluation there
        is no heat map: heat_loss is NaN and not part of the total.
    """
    del alpha
    prediction, log_heat = (output, None) if not isinstance(output, tuple) else output
    error = functional.smooth_l1_loss(
        ellipse_px(prediction) / 10, ellipse_px(batch.ellipse) / 10, reduction="none"
    )
    has_pupil = (batch.ellipse[:, 2] > 0).to(error.dtype)
    center = (error[:, :2].sum(dim=1) * has_pupil).sum() / has_pupil.sum().clamp(min=1)
    radius = error[:, 2:].sum(dim=1).mean()
    total = center + RADIUS_WEIGHT * radius
    heat = total.new_full((), math.nan)
    if log_heat is not None:
        heat = heat_loss(log_heat, batch.label, has_pupil)
        total = total + heat
    return dict(zip(ELLIPSE_TERMS, (total, center, radius, heat), strict=True))
