"""Horizontal flip: the image and every target are mirrored together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pupilseg.augment.part import ALL_COLUMNS, Part, per_frame
from pupilseg.geometry import WIDTH

if TYPE_CHECKING:
    from pupilseg.augment.config import AugmentConfig
    from pupilseg.augment.part import HostFrame, Numbers, Plan
    from pupilseg.loader.loader import Batch

LAST_X = (WIDTH - 1) / WIDTH
"""The last column in units of the width. Pixel centers are integers, so a flip maps cx to
`LAST_X - cx`."""


class FlipDraw(NamedTuple):
    """Random parameters of the flip.

    Attributes:
        flip: bool (N,).
    """

    flip: Tensor


class Flip(Part[FlipDraw]):
    """Mirrors frames left to right. The ellipse vector of a blink stays zero."""

    name = "flip"
    numbers = 1
    columns = ALL_COLUMNS

    def is_on(self, config: AugmentConfig) -> bool:
        return config.flip > 0

    def draw(
        self, numbers: Numbers, batch: Batch, config: AugmentConfig, earlier: Plan
    ) -> FlipDraw:
        return FlipDraw(numbers.one() < config.flip)

    def changes(self, drawn: FlipDraw) -> Tensor:
        return drawn.flip

    def on_device(
        self, batch: Batch, drawn: FlipDraw, config: AugmentConfig, constant: Tensor | None
    ) -> Batch:
        def mirror(x: Tensor) -> Tensor:
            if x.numel() == 0:  # a column that was not loaded
                return x
            return torch.where(per_frame(drawn.flip, x), x.flip(-1), x)

        ellipse = batch.ellipse
        if ellipse.numel():
            center_x, radius_x = ellipse[:, 0], ellipse[:, 2]
            center_x = torch.where(drawn.flip & (radius_x > 0), LAST_X - center_x, center_x)
            ellipse = torch.cat([center_x[:, None], ellipse[:, 1:]], dim=1)
        return replace(
            batch,
            image=mirror(batch.image),
            label=mirror(batch.label),
            spatial_weights=mirror(batch.spatial_weights),
            dist_map=mirror(batch.dist_map),
            ellipse=ellipse,
        )

    def on_host(self, frame: HostFrame, drawn: Any, config: AugmentConfig) -> None:
        for name, column in frame.columns.items():
            if name != "ellipse":
                frame.columns[name] = column[..., ::-1]
        if "ellipse" in frame.columns:
            ellipse = frame.writable("ellipse")
            if ellipse[2] > 0:
                ellipse[0] = LAST_X - ellipse[0]
