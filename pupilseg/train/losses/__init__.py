"""Training losses, one file each, and the table from which a network's task selects one.

To add a loss, write a module here with a function `(output, batch, alpha) -> {term: scalar}` whose
term "loss" carries the gradient, and add one line to `LOSSES`. Its terms become columns of the
history, with the prefixes `train_` and `valid_`.

All losses are computed in float32 or wider, also for half-precision outputs, because sums over
256,000 pixels lose small terms in half precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pupilseg.train.losses.ellipse import ELLIPSE_TERMS, ellipse_loss
from pupilseg.train.losses.segmentation import (
    SEGMENTATION_TERMS,
    alpha_schedule,
    segmentation_loss,
    segmentation_terms,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = [
    "ELLIPSE_TERMS",
    "LOSSES",
    "SEGMENTATION_TERMS",
    "Loss",
    "alpha_schedule",
    "ellipse_loss",
    "segmentation_loss",
    "segmentation_terms",
]


class Loss(NamedTuple):
    """A loss function and the names of the scalars that it returns.

    Attributes:
        function: maps (network output, `Batch`, alpha) to scalars by name.
        terms: these names; the first is "loss".
    """

    function: Callable[[Any, Any, float | Tensor], dict[str, Tensor]]
    terms: tuple[str, ...]


LOSSES = {
    "segmentation": Loss(segmentation_loss, SEGMENTATION_TERMS),
    "ellipse": Loss(ellipse_loss, ELLIPSE_TERMS),
}
"""Task of a network (`models.ModelEntry.task`) -> its loss."""
