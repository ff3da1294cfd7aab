"""Scale and shift: image and label are resampled, and the targets are recomputed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from pupilseg.augment.part import ALL_COLUMNS, PIXELS, Part, per_frame
from pupilseg.augment.targets_device import ellipse_vectors, spatial_weights, squared_distance
from pupilseg.augment.targets_host import TargetMaker
from pupilseg.errors import UsageError
from pupilseg.geometry import HEIGHT, RADIUS_UNIT, WIDTH
from pupilseg.loader.decode import distance_table, signed_maps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.augment.config import AugmentConfig
    from pupilseg.augment.part import Field, HostFrame, Numbers, Plan
    from pupilseg.loader.loader import Batch

SMALLEST, LARGEST = 0.5, 2.0
"""Limits of the scale factor. At 0.5, bilinear sampling still reads every second pixel, so noise
and lashes alias only a little. No filter removes this, since low-resolution cameras alias too."""


class MoveDraw(NamedTuple):
    """Random parameters of scale and shift.

    Attributes:
        moved: bool (N,): scaled or shifted.
        width: int32 (N,), of the scaled frame, px.
        height: int32 (N,), of the scaled frame, px.
        left: int32 (N,), column of the scaled frame's left edge in the result, px.
        top: int32 (N,), row of its top edge, px.
        border: float32 (N,), value outside the scaled frame, in [-1, 1].
    """

    moved: Tensor
    width: Tensor
    height: Tensor
    left: Tensor
    top: Tensor
    border: Tensor


class Move(Part[MoveDraw]):
    """Scales frames about the pupil's center, then shifts them.

    The labels of the host form and the device form differ only at pixels whose interpolated value
    is within 1e-3 of 1/2.
    The targets are always exactly those of the label.
    """

    name = "move"
    numbers = 5
    columns = ALL_COLUMNS

    def is_on(self, config: AugmentConfig) -> bool:
        return config.scale > 0 or (config.shift > 0 and config.reach > 0)

    def check(self, batch: Batch, config: AugmentConfig) -> None:
        """Raises UsageError if targets are present without the label to recompute them from."""
        if batch.label.numel():
            return
        for name in ("spatial_weights", "dist_map", "ellipse"):
            if getattr(batch, name).numel():
                raise UsageError(
                    f"augment: scale = {config.scale}, shift = {config.shift}, and the batch has "
                    f"{name} but no label to recompute it from; load the column label too, or set "
                    "both to 0"
                )

    def draw(
        self, numbers: Numbers, batch: Batch, config: AugmentConfig, earlier: Plan
    ) -> MoveDraw:
        chance, size, border = numbers.one(), numbers.one(), numbers.one()
        shift = (2 * numbers.many(2) - 1) * config.reach
        ellipse = _ellipses(batch)
        radius = (ellipse[:, 2] + ellipse[:, 3]) / 2 * RADIUS_UNIT
        is_blink = radius <= 0
        wanted = config.radius_min * (config.radius_max / config.radius_min) ** size
        scale = torch.where(is_blink, LARGEST ** (2 * size - 1), wanted / radius.clamp(min=1e-3))
        scale = scale.clamp(SMALLEST, LARGEST).masked_fill(chance >= config.scale, 1)
        shift = shift.masked_fill((chance >= config.shift)[:, None], 0)
        center_x = (ellipse[:, 0] * WIDTH).masked_fill(is_blink, (WIDTH - 1) / 2)
        center_x = torch.where(earlier["flip"].flip, WIDTH - 1 - center_x, center_x)
        center_y = (ellipse[:, 1] * HEIGHT).masked_fill(is_blink, (HEIGHT - 1) / 2)
        width, left = _place(scale, center_x, shift[:, 0], WIDTH)
        height, top = _place(scale, center_y, shift[:, 1], HEIGHT)
        return MoveDraw(
            moved=(width != WIDTH) | (height != HEIGHT) | (left != 0) | (top != 0),
            width=width,
            height=height,
            left=left,
            top=top,
            # More than half are darker than a pupil (0.13 of white), like the borders of real
            # cameras.
            border=1.2 * border**3 - 1,
        )

    def changes(self, drawn: MoveDraw) -> Tensor:
        return drawn.moved

    def constant(self, device: torch.device) -> Tensor:
        return distance_table(device)

    def on_device(
        self, batch: Batch, drawn: MoveDraw, config: AugmentConfig, constant: Tensor | None
    ) -> Batch:
        assert constant is not None

        def where_moved(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(per_frame(drawn.moved, old), new.to(old.dtype), old)

        image = warp(batch.image[:, 0], drawn, drawn.border)[:, None]
        changed = {"image": where_moved(image, batch.image)}
        if batch.label.numel():
            label = warp(batch.label.float(), drawn, torch.zeros_like(drawn.border)) > 0.5
            changed["label"] = where_moved(label, batch.label)
            if batch.spatial_weights.numel():
                weights = spatial_weights(label)
                changed["spatial_weights"] = where_moved(weights, batch.spatial_weights)
            if batch.dist_map.numel():
                maps = signed_maps(squared_distance(label), label, constant)
                changed["dist_map"] = where_moved(maps, batch.dist_map)
            if batch.ellipse.numel():
                changed["ellipse"] = where_moved(ellipse_vectors(label), batch.ellipse)
        return replace(batch, **changed)

    def on_host(self, frame: HostFrame, drawn: Any, config: AugmentConfig) -> None:
        scratch = frame.scratch.keep(_Scratch)
        scratch.warp(frame.columns["image"][0], frame.out["image"][0], drawn, drawn.border)
        if "label" in frame.out:
            label = frame.scratch.plane
            np.copyto(label, frame.columns["label"])
            scratch.warp(label, scratch.level, drawn, 0.0)
            scratch.targets.write(scratch.level > 0.5, frame.out)
        frame.columns = dict(frame.out)


class _Scratch:
    """Buffers reused by one thread."""

    def __init__(self) -> None:
        self.level = np.empty((HEIGHT, WIDTH), np.float32)
        self.targets = TargetMaker()
        self._scaled = np.empty(round(LARGEST**2 * PIXELS), np.float32)

    def warp(self, source: Field, out: NDArray[np.float32], drawn: Any, border: float) -> None:
        """Writes a scaled and shifted plane; `warp` does the same in torch.

        Args:
            source: float32 (400, 640).
            out: float32 (400, 640); may be `source`.
            drawn: the frame's row of the draw.
            border: value outside the scaled frame.
        """
        width, height, left, top = drawn.width, drawn.height, drawn.left, drawn.top
        scaled = self._scaled[: width * height].reshape(height, width)
        cv2.resize(source, (width, height), dst=scaled, interpolation=cv2.INTER_LINEAR)
        rows = slice(max(top, 0), min(top + height, HEIGHT))
        columns = slice(max(left, 0), min(left + width, WIDTH))
        if (rows.stop - rows.start, columns.stop - columns.start) != (HEIGHT, WIDTH):
            out.fill(border)
        out[rows, columns] = scaled[
            rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
        ]


def _ellipses(batch: Batch) -> Tensor:
    """Returns the batch's ellipse vectors, or those of its labels, or zeros; float32 (N, 4)."""
    if batch.ellipse.numel():
        return batch.ellipse
    if batch.label.numel():
        return ellipse_vectors(batch.label)
    return batch.ellipse.new_zeros(len(batch), 4)


def _place(scale: Tensor, center: Tensor, shift: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Returns size and first pixel of the scaled frames along one axis, int32 (N,) each.

    Scaling leaves the pupil's center (px) in place. The shift (in units of `length`) then moves it,
    clamped to the frame.
    """
    pixels = (scale * length).round()
    goal = (center + shift * length).clamp(0, length - 1)
    first = (goal + 0.5 - (center + 0.5) * pixels / length).round()
    return pixels.int(), first.int()


def warp(frames: Tensor, drawn: MoveDraw, border: Tensor) -> Tensor:
    """Returns scaled and shifted frames, by separable bilinear sampling as in `cv2.resize`.

    Args:
        frames: float32 (N, 400, 640).
        drawn: size and place of the scaled frames.
        border: (N,), value of pixels outside them.
    """
    x, x_inside = _samples(drawn.left, drawn.width, WIDTH)
    y, y_inside = _samples(drawn.top, drawn.height, HEIGHT)
    frames = _interpolate(frames, x[:, None, :].expand(-1, HEIGHT, -1), dim=2)
    frames = _interpolate(frames, y[:, :, None].expand(-1, -1, WIDTH), dim=1)
    inside = y_inside[:, :, None] & x_inside[:, None, :]
    return torch.where(inside, frames, border[:, None, None])


def _samples(first: Tensor, pixels: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Returns the source coordinate of each pixel along an axis, and whether it lies inside.

    Both (N, length).
    """
    place = torch.arange(length, device=first.device) - first[:, None]
    # Only the division rounds: the product has at most 20 bits plus one half, so it is exact.
    at = (place + 0.5) * length / pixels[:, None] - 0.5
    return at.clamp(0, length - 1), (place >= 0) & (place < pixels[:, None])


def _interpolate(frames: Tensor, at: Tensor, dim: int) -> Tensor:
    low = at.floor()
    part = at - low
    low = low.long()
    high = (low + 1).clamp(max=frames.shape[dim] - 1)
    return frames.gather(dim, low) * (1 - part) + frames.gather(dim, high) * part
