"""What is to be done to each frame of a batch, drawn at random: small tensors on the device.

Everything random is drawn here, so that what follows is a function of its arguments that two
forms can share, that compiles, and that tests can steer.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from pupilseg.augment.targets_device import ellipse_vectors, unless
from pupilseg.errors import UsageError
from pupilseg.geometry import HEIGHT, RADIUS_UNIT, WIDTH
from pupilseg.runtime.device import on_device
from pupilseg.runtime.distributed import ALONE

if TYPE_CHECKING:
    from torch import Tensor

    from pupilseg.augment.config import AugmentConfig
    from pupilseg.loader.loader import Batch
    from pupilseg.runtime.distributed import Ranks

PIXELS = HEIGHT * WIDTH
SMALLEST, LARGEST = 0.5, 2.0
"""Bounds of the scale. Bilinear sampling reads at least every second pixel at 0.5, so the little
aliasing there is (of noise and lashes) is left in: a coarser camera shows it too."""
RAYS = 8
BLUR_RADIUS = 4
"""Pixels that the blur reaches on each side: twice the largest sigma (`config.LARGEST_SIGMA`)."""
BLUR_LEAST = 0.3
"""Smallest sigma of a blur, px: less changes nothing."""
NOISE_VALUES = 5 * PIXELS
NOISE_SEED = 20


class Plan(NamedTuple):
    """What is done to each of N frames; float32 where nothing is said.

    Attributes:
        flip: bool (N,).
        moved: bool (N,): scaled or shifted.
        width: int32 (N,), of the scaled frame, px.
        height: int32 (N,).
        left: int32 (N,), where the scaled frame's left column comes to lie, px.
        top: int32 (N,).
        border: (N,), value outside the frame, in [-1, 1].
        source: (N, 2), x and y of the point that streaks come from, px.
        ray: (N, RAYS, 2), unit vectors along the streaks.
        start: (N, RAYS), distance of each streak from the source, px.
        length: (N, RAYS), px.
        thickness: (N, RAYS), half the width of the streak's foot, px.
        glow: (N, RAYS), brightness of its near end in units of [-1, 1]; 0 for no streak.
        sigma: (N,), of the blur, px; 0 for none.
        gamma: (N,), exponent.
        gain: (N,), factor.
        offset: (N,).
        noise: (N,), standard deviation on white, of either sign.
        noise_at: int32 (N,), where a frame's window of the noise field begins.
    """

    flip: Tensor
    moved: Tensor
    width: Tensor
    height: Tensor
    left: Tensor
    top: Tensor
    border: Tensor
    source: Tensor
    ray: Tensor
    start: Tensor
    length: Tensor
    thickness: Tensor
    glow: Tensor
    sigma: Tensor
    gamma: Tensor
    gain: Tensor
    offset: Tensor
    noise: Tensor
    noise_at: Tensor


@cache
def noise_field(device: torch.device) -> Tensor:
    """Returns the normal deviates that all noise is cut from, float32 (1280000,), on a device.

    Fresh deviates cost a CPU 1.2 ms a frame, more than all else together. A frame takes one of
    1,024,001 windows with one of two signs and a scale of its own: within it the values are
    independent, and no two frames of an epoch are likely to share them.
    """
    generator = torch.Generator().manual_seed(NOISE_SEED)
    return on_device(torch.randn(NOISE_VALUES, generator=generator), device)


def check_columns(batch: Batch, config: AugmentConfig) -> None:
    """Refuses to move frames whose targets could not follow.

    Raises:
        UsageError: a target is there, the label is not, and scale or shift is on.
    """
    if not config.moves or batch.label.numel():
        return
    for name in ("spatial_weights", "dist_map", "ellipse"):
        if getattr(batch, name).numel():
            raise UsageError(
                f"augment: scale = {config.scale}, shift = {config.shift}, and the batch has "
                f"{name} but no label to remake it from; load the column label too, or set both "
                "to 0"
            )


class _Uniform:
    """Deals out independent U(0, 1) columns of one drawing.

    Every part takes its columns whether it is on or not, so that switching one leaves the others
    as they were.
    """

    def __init__(self, rows: int, columns: int, generator: torch.Generator, ranks: Ranks) -> None:
        shape = (rows * ranks.world_size, columns)
        # Drawn for the batches of all ranks, of which each takes its frames: n ranks do to each
        # frame what one process does.
        drawn = torch.rand(shape, generator=generator, device=generator.device)
        self._values = drawn[ranks.rank :: ranks.world_size]
        self._next = 0

    def one(self) -> Tensor:
        """Returns (rows,)."""
        return self.many(1)[:, 0]

    def many(self, columns: int) -> Tensor:
        """Returns (rows, columns)."""
        self._next += columns
        return self._values[:, self._next - columns : self._next]


def make_plan(
    batch: Batch, config: AugmentConfig, generator: torch.Generator, ranks: Ranks = ALONE
) -> Plan:
    """Draws what to do to each frame, without reading anything back from the device.

    Args:
        batch: to be augmented; its ellipses say where the pupils are and how large.
        config: strengths.
        generator: on the batch's device; the only source of randomness, alike on all ranks.
        ranks: the processes that share a batch.
    """
    draw = _Uniform(len(batch), 17 + 6 * RAYS, generator, ranks)
    flip = draw.one() < config.flip
    moves = _draw_motion(batch, config, draw, flip)
    streaks = _draw_streaks(config, draw)
    blurred = draw.one() < config.blur
    sigma = BLUR_LEAST + draw.one() * (config.blur_sigma - BLUR_LEAST)
    return Plan(
        flip=flip,
        **moves,
        **streaks,
        sigma=unless(~blurred, sigma.clamp(min=0), 0.0),
        gamma=((2 * draw.one() - 1) * config.gamma).exp(),
        gain=((2 * draw.one() - 1) * config.gain).exp(),
        offset=(2 * draw.one() - 1) * config.offset,
        noise=(2 * draw.one() - 1) * config.noise,
        noise_at=(draw.one() * (NOISE_VALUES - PIXELS)).int(),
    )


def _draw_motion(
    batch: Batch, config: AugmentConfig, draw: _Uniform, flip: Tensor
) -> dict[str, Tensor]:
    """Returns moved, width, height, left, top and border.

    The pupil's centre is the fixed point of the scale; the shift comes on top.
    """
    chance, size, border = draw.one(), draw.one(), draw.one()
    shift = (2 * draw.many(2) - 1) * config.reach
    ellipse = batch.ellipse
    if ellipse.numel() == 0:
        empty = batch.label.numel() == 0
        ellipse = ellipse.new_zeros(len(batch), 4) if empty else ellipse_vectors(batch.label)
    radius = (ellipse[:, 2] + ellipse[:, 3]) / 2 * RADIUS_UNIT
    seen = radius > 0
    wanted = config.radius_min * (config.radius_max / config.radius_min) ** size
    scale = torch.where(seen, wanted / radius.clamp(min=1e-3), LARGEST ** (2 * size - 1))
    scale = unless(chance >= config.scale, scale.clamp(SMALLEST, LARGEST), 1.0)
    shift = unless((chance >= config.shift)[:, None], shift, 0.0)

    places = []
    for axis, length in enumerate((WIDTH, HEIGHT)):
        pixels = (scale * length).round()
        center = unless(~seen, ellipse[:, axis] * length, (length - 1) / 2)
        if axis == 0:
            center = torch.where(flip, length - 1 - center, center)
        goal = (center + shift[:, axis] * length).clamp(0, length - 1)
        first = (goal + 0.5 - (center + 0.5) * pixels / length).round()
        places.append((pixels.int(), first.int()))
    (width, left), (height, top) = places
    moved = (width != WIDTH) | (height != HEIGHT) | (left != 0) | (top != 0)
    # More than half are darker than a pupil (0.13 of white), as the borders of real cameras are.
    return {
        "moved": moved,
        "width": width,
        "height": height,
        "left": left,
        "top": top,
        "border": 1.2 * border**3 - 1,
    }


def _draw_streaks(config: AugmentConfig, draw: _Uniform) -> dict[str, Tensor]:
    """Returns source, ray, start, length, thickness and glow.

    Two of three frames show rays around a lamp's reflection, the third a single long line; each
    fades outwards, as the renderer's `optics.add_spectacles` draws them.
    """
    streaked = (draw.one() < config.streaks)[:, None]
    single = (draw.one() < 1 / 3)[:, None]
    x, y = draw.one() * WIDTH, draw.one() * (HEIGHT + 120) - 60
    angle = draw.many(RAYS) * (2 * math.pi)
    start = draw.many(RAYS) * 60
    length = (40 + 280 * draw.many(RAYS)) * (1 + single.float())
    thickness = 1 + 4 * draw.many(RAYS) ** 2
    first = torch.arange(RAYS, device=x.device) == 0
    chance = draw.many(RAYS)
    shown = streaked & (first | (~single & (chance < 0.7)))
    glow = unless(~shown, 0.1 + 0.9 * draw.many(RAYS) ** 2, 0.0)
    return {
        "source": torch.stack([x, y], dim=1),
        "ray": torch.stack([angle.cos(), angle.sin()], dim=2),
        "start": start,
        "length": length,
        "thickness": thickness,
        "glow": glow,
    }
