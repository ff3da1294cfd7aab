"""Augmentation on the device, on whole batches, with every target kept consistent.

A horizontal flip mirrors every target with the image; scale and shift move image and label, and
the targets are made anew from the moved label; all else changes the image alone. Two forms give
the same result from the same random numbers: `host`, frame by frame with OpenCV on the CPU, and
`dense`, whole batches in torch on CUDA. Random numbers come from a generator of their own, so a run
is a function of its seed.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING

import torch

from pupilseg.augment.config import AugmentConfig
from pupilseg.augment.dense import augment_dense
from pupilseg.augment.host import augment_on_host
from pupilseg.augment.plan import check_columns, make_plan, noise_field
from pupilseg.loader.decode import distance_table
from pupilseg.runtime.compilation import Compiled
from pupilseg.runtime.distributed import ALONE

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pupilseg.augment.plan import Plan
    from pupilseg.loader.loader import Batch
    from pupilseg.runtime.distributed import Ranks

    Dense = Callable[[Batch, Plan, AugmentConfig, Tensor, Tensor], Batch]

__all__ = ["AugmentConfig", "augment"]


def augment(
    batch: Batch,
    config: AugmentConfig,
    generator: torch.Generator,
    ranks: Ranks = ALONE,
    *,
    compiled: bool = True,
) -> Batch:
    """Returns an augmented copy of a batch; the original's buffers are not written to.

    Columns that no part changes are those of the batch itself, not copies.

    Args:
        batch: on any device. A column that was not asked for, an empty tensor, stays empty.
        config: strengths.
        generator: on the batch's device if that is CUDA, else on the CPU; alike on all ranks.
        ranks: the processes that share a batch.
        compiled: on CUDA, fuse the work with `torch.compile` (made at the first batch; without a
            working compiler one warning is given and the work is done unfused). Without it the
            squared distances take temporaries of 64 MiB and far longer.

    Raises:
        UsageError: scale or shift is on and a target is there without the label to remake it from.
    """
    check_columns(batch, config)
    device = batch.image.device
    if device.type not in ("cpu", "cuda"):
        # Unified memory makes the way cheap; Metal lacks cumulative extrema and 64-bit sums.
        return _moved(augment(_moved(batch, "cpu"), config, generator, ranks), device)
    with torch.no_grad():
        plan = make_plan(batch, config, generator, ranks)
        if device.type == "cpu":
            return augment_on_host(batch, plan, config)
        form = _compiled() if device.type == "cuda" and compiled else augment_dense
        return form(batch, plan, config, distance_table(device), noise_field(device))


def _moved(batch: Batch, device: torch.device | str) -> Batch:
    """Returns a batch on another device."""
    return replace(batch, **{f.name: getattr(batch, f.name).to(device) for f in fields(batch)})


@cache
def _compiled() -> Dense:
    """Returns the compiled `augment_dense`, made when first wanted."""
    return Compiled(augment_dense, "augmentation")
