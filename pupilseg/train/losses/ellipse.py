"""The loss of ellipse networks, which is computed on their soft mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pupilseg.train.metrics import ellipse_px

if TYPE_CHECKING:
    from torch import Tensor

    from pupilseg.loader.loader import Batch
    from pupilseg.models.ellipse import EllipseOutput

ELLIPSE_TERMS = ("loss", "ce_loss", "dice_loss", "center_loss", "radius_loss")
COVER_CE_WEIGHT = 10.0
"""Weight of cross-entropy, which is a mean over 16,000 cells, of which only 300 are pupil."""


def cover_loss(cover: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cross-entropy and Dice loss of a soft mask of cells, averaged over frames.

    A cell's target is the share of its pixels that are pupil. Cross-entropy is the mean over
    cells; for a perfect mask it is the entropy of the boundary cells, not 0. Dice has squares in
    the denominator, so that it is 0 for a perfect soft mask; a frame without a pupil adds 0 to it.

    Args:
        cover: logits of the shares.
        label: 0 or 1.

    Shape:
        cover: (N, h, w). label: (N, H, W), with H and W multiples of h and w. Output: two scalars.

    Reference:
        V-Net (Milletari et al., arXiv 1606.04797) for this form of Dice.
    """
    cell = (label.shape[1] // cover.shape[1], label.shape[2] // cover.shape[2])
    target = functional.avg_pool2d(label[:, None].to(cover.dtype), cell)[:, 0]
    cross_entropy = functional.binary_cross_entropy_with_logits(cover, target)
    share = torch.sigmoid(cover)
    overlap = (share * target).sum(dim=(1, 2))
    size = target.square().sum(dim=(1, 2))
    total = share.square().sum(dim=(1, 2)) + size
    dice = (1 - 2 * overlap / total.clamp(min=1e-6)) * (size > 0)
    return cross_entropy, dice.mean()


def ellipse_loss(output: EllipseOutput, batch: Batch, alpha: float | Tensor) -> dict[str, Tensor]:
    """Returns the soft mask's loss and its terms, and the error of the four ellipse numbers.

    The numbers are the mask's moments, and only the mask is trained. If a dark patch is mistaken
    for the pupil, a loss on the numbers would move the center of that patch, and every weight tried
    for such a loss made the results worse (docs/benchmarks.md). The errors of the numbers (smooth
    L1 in units of 10 px, over frames with a pupil, 0 for others) are only reported.

    Args:
        output: network output in training mode, or with `with_map` set.
        batch: the targets label and ellipse.
        alpha: not used; the loop passes it to every loss.

    Shape:
        output: ellipse (N, 4) and cover (N, h, w). Output: scalars by the names of
        `ELLIPSE_TERMS`, means over frames.

    Reference:
        This project (docs/benchmarks.md).
    """
    del alpha
    cross_entropy, dice = cover_loss(output.cover.float(), batch.label)
    error = functional.smooth_l1_loss(
        ellipse_px(output.ellipse.detach()) / 10, ellipse_px(batch.ellipse) / 10, reduction="none"
    )
    has_pupil = (batch.ellipse[:, 2] > 0).to(error.dtype)
    return {
        "loss": COVER_CE_WEIGHT * cross_entropy + dice,
        "ce_loss": cross_entropy,
        "dice_loss": dice,
        "center_loss": (error[:, :2].sum(dim=1) * has_pupil).mean(),
        "radius_loss": (error[:, 2:].sum(dim=1) * has_pupil).mean(),
    }
