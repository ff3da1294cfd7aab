"""Bright streaks, as spectacles cause: rays around a lamp's reflection, or one long line."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pupilseg.augment.part import Part
from pupilseg.geometry import HEIGHT, WIDTH

if TYPE_CHECKING:
    from pupilseg.augment.config import AugmentConfig
    from pupilseg.augment.part import HostFrame, Numbers, Plan
    from pupilseg.loader.loader import Batch

RAYS = 8
"""Maximum number of streaks in a frame."""
SINGLE_SHARE = 1 / 3
"""Share of streaked frames with a single line, twice as long, instead of rays."""
RAY_SHARE = 0.7
"""Probability of each ray after the first."""
MARGIN_PX = 60
"""Largest distance of a source above or below the frame."""
START_PX = 60
LENGTH_PX = (40, 320)
X = np.arange(WIDTH, dtype=np.float32)
Y = np.arange(HEIGHT, dtype=np.float32)[:, None]


class StreaksDraw(NamedTuple):
    """Random parameters of the streaks, float32.

    Attributes:
        source: (N, 2), x and y of the point that the streaks come from, px.
        ray: (N, RAYS, 2), unit vectors along the streaks.
        start: (N, RAYS), distance of each streak from the source, px.
        length: (N, RAYS), px.
        thickness: (N, RAYS), half the width at the foot of the profile, px.
        glow: (N, RAYS), brightness of the near end in units of [-1, 1]; 0 for no streak.
    """

    source: Tensor
    ray: Tensor
    start: Tensor
    length: Tensor
    thickness: Tensor
    glow: Tensor


class Streaks(Part[StreaksDraw]):
    """Adds streaks that fade outward, as `pupilseg.synthetic.spectacles` draws them."""

    name = "streaks"
    numbers = 4 + 6 * RAYS

    def is_on(self, config: AugmentConfig) -> bool:
        return config.streaks > 0

    def draw(
        self, numbers: Numbers, batch: Batch, config: AugmentConfig, earlier: Plan
    ) -> StreaksDraw:
        streaked = (numbers.one() < config.streaks)[:, None]
        single = (numbers.one() < SINGLE_SHARE)[:, None]
        x = numbers.one() * WIDTH
        y = numbers.one() * (HEIGHT + 2 * MARGIN_PX) - MARGIN_PX
        angle = numbers.many(RAYS) * (2 * math.pi)
        start = numbers.many(RAYS) * START_PX
        shortest, longest = LENGTH_PX
        length = (shortest + (longest - shortest) * numbers.many(RAYS)) * (1 + single.float())
        thickness = 1 + 4 * numbers.many(RAYS) ** 2
        first = torch.arange(RAYS, device=x.device) == 0
        shown = streaked & (first | (~single & (numbers.many(RAYS) < RAY_SHARE)))
        glow = (0.1 + 0.9 * numbers.many(RAYS) ** 2).masked_fill(~shown, 0)
        return StreaksDraw(
            source=torch.stack([x, y], dim=1),
            ray=torch.stack([angle.cos(), angle.sin()], dim=2),
            start=start,
            length=length,
            thickness=thickness,
            glow=glow,
        )

    def changes(self, drawn: StreaksDraw) -> Tensor:
        return (drawn.glow > 0).any(dim=1)

    def on_device(
        self, batch: Batch, drawn: StreaksDraw, config: AugmentConfig, constant: Tensor | None
    ) -> Batch:
        return replace(batch, image=(batch.image + _light(drawn)).clamp(max=1))

    def on_host(self, frame: HostFrame, drawn: Any, config: AugmentConfig) -> None:
        image = frame.image
        for k in np.flatnonzero(drawn.glow):
            # Only within the bounding box of the streak, which adds no light outside it.
            ray, thickness, length = drawn.ray[k], drawn.thickness[k], drawn.length[k]
            near = drawn.source + drawn.start[k] * ray
            ends = np.stack([near, near + length * ray])
            low = np.floor(ends.min(axis=0) - thickness).astype(int).clip(0)
            high = np.ceil(ends.max(axis=0) + thickness).astype(int).clip(0) + 1
            box = np.s_[low[1] : high[1], low[0] : high[0]]
            x = X[low[0] : high[0]] - drawn.source[0]
            y = Y[low[1] : high[1]] - drawn.source[1]
            along = x * ray[0] + (y * ray[1] - drawn.start[k])
            across = np.abs(y * ray[0] - x * ray[1])
            across /= -thickness
            across += 1
            fade = along / -length
            fade += 1
            np.minimum(fade, along, out=fade)
            np.clip(fade, 0, 1, out=fade)
            fade *= np.maximum(across, 0, out=across)
            fade *= drawn.glow[k]
            image[box] += fade
        np.minimum(image, 1, out=image)


def _light(drawn: StreaksDraw) -> Tensor:
    """Returns the light of all streaks, float32 (N, 1, 400, 640)."""
    device = drawn.glow.device
    x = (torch.arange(WIDTH, device=device) - drawn.source[:, :1])[:, None, :]
    y = (torch.arange(HEIGHT, device=device) - drawn.source[:, 1:])[:, :, None]
    light = torch.zeros((), device=device)
    for k in range(RAYS):
        cos = drawn.ray[:, k, 0, None, None]
        sin = drawn.ray[:, k, 1, None, None]
        start = drawn.start[:, k, None, None]
        length = drawn.length[:, k, None, None]
        thickness = drawn.thickness[:, k, None, None]
        glow = drawn.glow[:, k, None, None]
        along = x * cos + (y * sin - start)
        across = (y * cos - x * sin).abs()
        fade = torch.minimum(along, 1 - along / length).clamp(0, 1)
        light = light + glow * fade * (1 - across / thickness).clamp(min=0)
    return light[:, None]
