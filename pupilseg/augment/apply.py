"""Draws the parameters of a batch and applies all parts, on the host or on the device."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pupilseg.augment.part import HostFrame, Numbers, Scratch
from pupilseg.augment.parts import PARTS
from pupilseg.runtime.compilation import Compiled
from pupilseg.runtime.distributed import ALONE
from pupilseg.runtime.threads import RowPool

if TYPE_CHECKING:
    from torch import Tensor

    from pupilseg.augment.config import AugmentConfig
    from pupilseg.augment.part import Plan
    from pupilseg.loader.loader import Batch
    from pupilseg.runtime.distributed import Ranks

    Constants = dict[str, Tensor | None]


def augment(
    batch: Batch,
    config: AugmentConfig,
    generator: torch.Generator,
    ranks: Ranks = ALONE,
    *,
    compiled: bool = True,
) -> Batch:
    """Returns an augmented copy of a batch; the batch's own tensors are not written to.

    Columns that no part changes are the batch's own tensors, not copies.

    Args:
        batch: on any device. Columns that were not loaded (empty tensors) stay empty.
        config: strengths.
        generator: on the batch's device for CUDA, otherwise on the CPU. Its state must be the same
            on all ranks.
        ranks: the processes that share a batch.
        compiled: on CUDA, fuse the operations with `torch.compile` at the first batch. Without a
            working compiler, one warning is logged and they run one by one; the squared distances
            then need temporaries of 64 MiB and take far longer.

    Raises:
        UsageError: scale or shift is on, and a target is present without the label to recompute
            it from.
    """
    device = batch.image.device
    if device.type not in ("cpu", "cuda"):
        # Unified memory makes the copy cheap; Metal lacks cumulative extrema and 64-bit sums.
        return _copied(augment(_copied(batch, "cpu"), config, generator, ranks), device)
    with torch.no_grad():
        plan = make_plan(batch, config, generator, ranks)
        if device.type == "cpu":
            return augment_on_host(batch, plan, config)
        form = _compiled() if compiled else augment_on_device
        return form(batch, plan, config, constants(config, device))


def _copied(batch: Batch, device: torch.device | str) -> Batch:
    return replace(batch, **{f.name: getattr(batch, f.name).to(device) for f in fields(batch)})


@cache
def _compiled() -> Compiled[Any, Batch]:
    return Compiled(augment_on_device, "augmentation")


def make_plan(
    batch: Batch, config: AugmentConfig, generator: torch.Generator, ranks: Ranks = ALONE
) -> Plan:
    """Draws the parameters of all parts, without reading anything back from the device.

    Args:
        batch: to be augmented; its ellipses give position and size of the pupils.
        config: strengths.
        generator: on the batch's device; the only source of randomness.
        ranks: the processes that share a batch.

    Returns:
        Part name -> draw, on the batch's device.

    Raises:
        UsageError: a part lacks a column.
    """
    for part in PARTS:
        if part.is_on(config):
            part.check(batch, config)
    # Each rank draws the numbers of the global batch and keeps those of its own frames, so a frame
    # is augmented the same way with any number of ranks.
    shape = (len(batch) * ranks.world_size, sum(part.numbers for part in PARTS))
    values = torch.rand(shape, generator=generator, device=generator.device)
    values = values[ranks.rank :: ranks.world_size]
    plan: Plan = {}
    for part, own in zip(PARTS, values.split([part.numbers for part in PARTS], 1), strict=True):
        numbers = Numbers(own)
        plan[part.name] = part.draw(numbers, batch, config, plan)
        assert numbers.taken == part.numbers, (
            f"augmentation part {part.name} took {numbers.taken} random numbers per frame, "
            f"expected {part.numbers}, the value of its attribute `numbers`"
        )
    return plan


def constants(config: AugmentConfig, device: torch.device) -> Constants:
    """Returns the constants of the device form: part name -> tensor, for parts that are on."""
    return {part.name: part.constant(device) for part in PARTS if part.is_on(config)}


def augment_on_device(
    batch: Batch, plan: Plan, config: AugmentConfig, constants: Constants
) -> Batch:
    """Returns the augmented batch, computed in torch on whole batches.

    No value is read back to the host: every part runs on every frame, and a select restores the
    frames that the part does not change. Meant to be compiled on CUDA. On the CPU,
    `augment_on_host` takes a tenth of the time.

    Args:
        batch: on any device; not written to.
        plan: from `make_plan`, on the same device.
        config: selects the parts; their parameters are in the plan.
        constants: from the function `constants`.
    """
    on = [part for part in PARTS if part.is_on(config)]
    for part in on:
        batch = part.on_device(batch, plan[part.name], config, constants[part.name])
    if any(part.clamp for part in on):
        batch = replace(batch, image=batch.image.clamp(-1, 1))
    return batch


def augment_on_host(batch: Batch, plan: Plan, config: AugmentConfig) -> Batch:
    """Returns the augmented batch, computed frame by frame with OpenCV on the CPU.

    The result equals that of `augment_on_device` within 1e-5, except for the pixels described in
    `Move`. Only the parts that change a frame are run on it. The frames are divided among as many
    threads as torch may use; OpenCV and NumPy release the GIL.

    Args:
        batch: on the CPU; not written to.
        plan: from `make_plan`, on the CPU.
        config: selects the parts; their parameters are in the plan.
    """
    on = [part for part in PARTS if part.is_on(config)]
    changed = {part: part.changes(plan[part.name]).tolist() for part in on}
    steps = [part for part in on if any(changed[part])]
    if not steps:
        return batch
    rows = {part: _rows(plan[part.name]) for part in steps}
    columns = {column for part in steps for column in part.columns}
    columns = {column for column in columns if getattr(batch, column).numel()}
    tensors = {column: torch.empty_like(getattr(batch, column)) for column in columns}
    old = {column: getattr(batch, column).numpy() for column in columns}
    new = {column: tensor.numpy() for column, tensor in tensors.items()}
    clamp = any(part.clamp for part in on)

    def change(row: int, scratch: Scratch) -> None:
        source = {column: array[row] for column, array in old.items()}
        frame = HostFrame(source, {name: array[row] for name, array in new.items()}, scratch)
        for part in steps:
            if changed[part][row]:
                part.on_host(frame, rows[part][row], config)
        if clamp:
            np.clip(frame.image, -1, 1, out=frame.image)
        for column in columns:
            frame.writable(column)

    _pool(torch.get_num_threads()).run(change, len(batch))
    return replace(batch, **tensors)


def _rows(drawn: Any) -> list[Any]:
    """Splits a draw by frame, into Python numbers (arrays where a frame has several values)."""
    values = (list(v.numpy()) if v.ndim > 1 else v.tolist() for v in drawn)
    return [type(drawn)(*row) for row in zip(*values, strict=True)]


@cache
def _pool(threads: int) -> RowPool[Scratch]:
    return RowPool(Scratch, threads, "augment")
