"""Applies a plan to a whole batch in torch: no value is read back, every frame takes every step.

What a frame did not draw is undone by a select, so that nothing depends on values the host would
have to see. On CUDA all of it is meant to be compiled; `host` says the same for the CPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from pupilseg.augment.plan import BLUR_RADIUS, PIXELS, RAYS
from pupilseg.augment.targets_device import ellipse_vectors, spatial_weights, squared_distance
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.loader.decode import signed_maps

if TYPE_CHECKING:
    from torch import Tensor

    from pupilseg.augment.config import AugmentConfig
    from pupilseg.augment.plan import Plan
    from pupilseg.loader.loader import Batch

LIFT = 1 + 1e-6
"""Added before the logarithm that a power takes: sampling and blur may leave -1 - 1e-7 on black."""


def augment_dense(
    batch: Batch, plan: Plan, config: AugmentConfig, table: Tensor, field: Tensor
) -> Batch:
    """Returns the augmented batch.

    Args:
        batch: on any device; not written to.
        plan: on the same device.
        config: says which parts are on; strengths are in the plan.
        table: `shards.decode.distance_table` of the device.
        field: `plan.noise_field` of the device.
    """
    if config.flip:
        batch = _flip(batch, plan.flip)
    if config.moves:
        batch = _move(batch, plan, table)
    image = batch.image
    if config.streaks:
        image = (image + _streaks(plan)).clamp(max=1)
    if config.blur and config.blur_sigma:
        image = _blur(image, plan.sigma)
    if config.toned:
        image = _tone(image, plan, config)
    if config.noise:
        image = _noise(image, plan, field)
    if config.toned or config.noise:
        image = image.clamp(-1, 1)
    return replace(batch, image=image)


def per_frame(values: Tensor, like: Tensor) -> Tensor:
    """Returns (N,) shaped to broadcast over the frames of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def mirrored_center(ellipse: Tensor) -> Tensor:
    """Returns the normalised cx of mirrored ellipses, (N,); that of a blink stays 0."""
    # Pixel centres are integers, so the mirror of cx px is width - 1 - cx px.
    return torch.where(ellipse[:, 2] > 0, (WIDTH - 1) / WIDTH - ellipse[:, 0], ellipse[:, 0])


def _flip(batch: Batch, flip: Tensor) -> Batch:
    """Mirrors left and right."""

    def mirror(x: Tensor) -> Tensor:
        if x.numel() == 0:  # a column that the loader was not asked for
            return x
        return torch.where(per_frame(flip, x), x.flip(-1), x)

    ellipse = batch.ellipse
    if ellipse.numel():
        center_x = torch.where(flip, mirrored_center(ellipse), ellipse[:, 0])
        ellipse = torch.cat([center_x[:, None], ellipse[:, 1:]], dim=1)
    return replace(
        batch,
        image=mirror(batch.image),
        label=mirror(batch.label),
        spatial_weights=mirror(batch.spatial_weights),
        dist_map=mirror(batch.dist_map),
        ellipse=ellipse,
    )


def _move(batch: Batch, plan: Plan, table: Tensor) -> Batch:
    """Scales and shifts image and label, and makes the targets anew."""

    def unless_still(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(per_frame(plan.moved, old), new.to(old.dtype), old)

    image = warp(batch.image[:, 0], plan, plan.border)[:, None]
    moved = replace(batch, image=unless_still(image, batch.image))
    if batch.label.numel() == 0:
        return moved
    label = warp(batch.label.float(), plan, torch.zeros_like(plan.border)) > 0.5
    moved = replace(moved, label=unless_still(label, batch.label))
    if batch.spatial_weights.numel():
        weights = spatial_weights(label)
        moved = replace(moved, spatial_weights=unless_still(weights, batch.spatial_weights))
    if batch.dist_map.numel():
        maps = signed_maps(squared_distance(label), label, table)
        moved = replace(moved, dist_map=unless_still(maps, batch.dist_map))
    if batch.ellipse.numel():
        moved = replace(moved, ellipse=unless_still(ellipse_vectors(label), batch.ellipse))
    return moved


def warp(frames: Tensor, plan: Plan, border: Tensor) -> Tensor:
    """Returns scaled and shifted frames by separable bilinear sampling, as `cv2.resize` does it.

    Args:
        frames: float32 (N, 400, 640).
        plan: gives size and place of the scaled frames.
        border: (N,), value of pixels outside of them.
    """
    x, x_inside = _samples(plan.left, plan.width, WIDTH)
    y, y_inside = _samples(plan.top, plan.height, HEIGHT)
    frames = _interpolate(frames, x[:, None, :].expand(-1, HEIGHT, -1), dim=2)
    frames = _interpolate(frames, y[:, :, None].expand(-1, -1, WIDTH), dim=1)
    inside = y_inside[:, :, None] & x_inside[:, None, :]
    return torch.where(inside, frames, border[:, None, None])


def _samples(first: Tensor, pixels: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Returns where each pixel of an axis samples the source, and whether it does: (N, length)."""
    place = torch.arange(length, device=first.device) - first[:, None]
    # One rounding only: the product is exact, since it has at most 20 bits and a half.
    at = (place + 0.5) * length / pixels[:, None] - 0.5
    return at.clamp(0, length - 1), (place >= 0) & (place < pixels[:, None])


def _interpolate(frames: Tensor, at: Tensor, dim: int) -> Tensor:
    low = at.floor()
    part = at - low
    low = low.long()
    high = (low + 1).clamp(max=frames.shape[dim] - 1)
    return frames.gather(dim, low) * (1 - part) + frames.gather(dim, high) * part


def _streaks(plan: Plan) -> Tensor:
    """Returns the light of all streaks, float32 (N, 1, 400, 640)."""
    x = torch.arange(WIDTH, device=plan.glow.device) - plan.source[:, :1]
    y = torch.arange(HEIGHT, device=plan.glow.device) - plan.source[:, 1:]
    x, y = x[:, None, :], y[:, :, None]
    light = torch.zeros((), device=plan.glow.device)
    for k in range(RAYS):
        cos, sin, start, length, thickness, glow = (
            value[:, None, None]
            for value in (
                plan.ray[:, k, 0],
                plan.ray[:, k, 1],
                plan.start[:, k],
                plan.length[:, k],
                plan.thickness[:, k],
                plan.glow[:, k],
            )
        )
        along = x * cos + (y * sin - start)
        across = (y * cos - x * sin).abs()
        fade = torch.minimum(along, 1 - along / length).clamp(0, 1)
        light = light + glow * fade * (1 - across / thickness).clamp(min=0)
    return light[:, None]


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Blurs with each frame's own sigma, px; frames with sigma 0 keep their bits."""
    # Not a convolution: on CUDA that would be rounded to TF32 where the engine allows it.
    tap = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=image.device)
    kernel = (-0.5 * (tap / sigma.clamp(min=0.1)[:, None]).square()).exp()
    kernel = (kernel / kernel.sum(dim=1, keepdim=True))[:, :, None, None, None]
    r = BLUR_RADIUS
    wide = F.pad(image, (r, r, 0, 0), mode="replicate")
    rows = wide[..., :WIDTH] * kernel[:, 0]
    for k in range(1, 2 * r + 1):
        rows = rows + wide[..., k : k + WIDTH] * kernel[:, k]
    tall = F.pad(rows, (0, 0, r, r), mode="replicate")
    blurred = tall[..., :HEIGHT, :] * kernel[:, 0]
    for k in range(1, 2 * r + 1):
        blurred = blurred + tall[..., k : k + HEIGHT, :] * kernel[:, k]
    return torch.where(per_frame(sigma, image) > 0, blurred, image)


def _tone(image: Tensor, plan: Plan, config: AugmentConfig) -> Tensor:
    """Changes gamma, gain and offset; `2 gain ((image + 1) / 2)^gamma + offset - 1`, unclipped."""
    gamma, gain, offset = (per_frame(v, image) for v in (plan.gamma, plan.gain, plan.offset))
    if not config.gamma:
        return image * gain + (gain + offset - 1)
    log_factor = (2 * gain).log() - gamma * math.log(2)
    return ((image + LIFT).log() * gamma + log_factor).exp() + (offset - 1)


def _noise(image: Tensor, plan: Plan, field: Tensor) -> Tensor:
    """Adds noise whose deviation grows linearly from a half on black to one on white; unclipped."""
    at = plan.noise_at[:, None] + torch.arange(PIXELS, dtype=torch.int32, device=field.device)
    deviation = (image * 0.25 + 0.75) * per_frame(plan.noise, image)
    return image + field[at].view_as(image) * deviation
