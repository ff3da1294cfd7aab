"""Lashes of both lids and brows: tapering curved strokes, from sparse to heavy with mascara."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.synthetic.fields import draw_strokes, soften_canvas
from pupilseg.synthetic.ranges import between

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.synthetic.anatomy import Eye
    from pupilseg.synthetic.fields import Field
    from pupilseg.synthetic.frame import Frame

    Curve = NDArray[np.float64]

POINTS = 9
"""Points per hair; 5 px apart at most, so that the longest lashes look round."""


class Style(NamedTuple):
    """Appearance of the lashes in one frame.

    Attributes:
        hairs: number of lashes on the upper lid.
        length: mean length in eye coordinates.
        heading_rad: direction in the middle of the lid: pi/2 is up, -pi/2 down over the eye.
        fan: outward turn of the outermost lashes, rad.
        bend: distance of the tip from a straight line, as a share of the length.
        clumps: number of groups whose tips meet; 0 for none.
        thick: whether mascara doubles the width.
    """

    hairs: int
    length: float
    heading_rad: float
    fan: float
    bend: float
    clumps: int
    thick: bool


def _style(rng: np.random.Generator, closed: bool) -> Style:
    kind = rng.random()
    heavy = bool(rng.random() < 0.2)
    count = int(between(rng, 100, 220)) if heavy else int(between(rng, 25, 130))
    if closed:
        heading, length = -between(rng, 0.9, 1.5), between(rng, 15, 45)
    elif kind < 0.66:
        heading, length = between(rng, 1.2, 1.9), between(rng, 24, 72)
    elif kind < 0.84:
        heading, length = between(rng, 1.3, 1.8), between(rng, 6, 18)
    else:
        heading, length = -between(rng, 1.2, 1.8), between(rng, 15, 60)
    return Style(
        count,
        length,
        heading,
        between(rng, 0.4, 1.35),
        between(rng, -0.1, 0.6),
        int(rng.integers(6, 26)) if rng.random() < 0.6 else 0,
        heavy,
    )


def _hairs(roots: Curve, angle: Curve, length: Curve, bend: Curve) -> Curve:
    """Returns curves (n, points, 2) in eye coordinates from their roots (n, 2)."""
    s = np.linspace(0, 1, POINTS)[None, :]
    cos, sin = np.cos(angle)[:, None], -np.sin(angle)[:, None]
    along, across = s * length[:, None], bend[:, None] * s * s * length[:, None]
    x = roots[:, :1] + along * cos - across * sin
    y = roots[:, 1:] + along * sin + across * cos
    return np.stack([x, y], axis=-1)


def _upper_lashes(rng: np.random.Generator, eye: Eye, style: Style) -> Curve:
    n = style.hairs
    t = np.clip(rng.uniform(-0.95, 1.0, n) + 0.08 * rng.standard_normal(n), -0.98, 1.02)
    lids = eye.lids
    y = lids.curves(np.clip(t, -0.99, 0.99))[0]
    # Seen from below, lashes that point up start behind the edge of the lid.
    rim = 0.0 if style.heading_rad < 0 else between(rng, 1, 20)
    above = np.abs(rng.normal(0, 3, n)) + rim * (1 - np.abs(t) ** 3)
    roots = np.stack([t * lids.half_width, y - above], -1)
    upward = math.copysign(1, style.heading_rad)
    spread = rng.normal(0, between(rng, 0.08, 0.4), n) - upward * style.fan * t
    aim = t
    if style.clumps:
        center = rng.uniform(-1, 1, style.clumps)
        nearest = np.abs(t[:, None] - center[None, :]).argmin(axis=1)
        aim = center[nearest]
        spread += upward * 1.1 * (t - aim) * lids.half_width / max(style.length, 12)
    length = style.length * rng.uniform(0.4, 1.3, n) * (1 - 0.35 * np.abs(aim) ** 2)
    bend = upward * (style.bend * np.sign(t) + rng.normal(0, between(rng, 0.1, 0.45), n))
    return _hairs(roots, style.heading_rad + spread, length, bend)


def _lower_lashes(rng: np.random.Generator, eye: Eye) -> Curve:
    n = int(rng.integers(0, 60))
    t = rng.uniform(-0.7, 1.0, n)
    y = eye.lids.curves(np.clip(t, -0.99, 0.99))[1]
    roots = np.stack([t * eye.lids.half_width, y + 2], -1)
    upright = rng.random() < 0.3
    heading = (math.pi / 2 if upright else -math.pi / 2) + rng.normal(0, 0.35, n)
    heading += (-0.6 if upright else 0.6) * t
    length = between(rng, 6, 24) * rng.uniform(0.5, 1.3, n)
    return _hairs(roots, heading, length, rng.normal(0, 0.3, n))


def _brow(rng: np.random.Generator, eye: Eye) -> Curve:
    n = int(between(rng, 150, 320))
    t = rng.uniform(-1.1, 1.25, n)
    height = between(rng, 115, 200)
    thickness = between(rng, 8, 24) * (1.15 - 0.45 * t)
    y = -height - between(rng, 5, 40) * (1 - t * t) + rng.normal(0, 0.6, n) * thickness
    roots = np.stack([t * eye.lids.half_width, y], -1)
    heading = 0.9 - 0.75 * (t + 1) / 2 + rng.normal(0, 0.22, n)
    return _hairs(roots, heading, rng.uniform(14, 34, n), rng.normal(-0.1, 0.12, n))


def add_hair(rng: np.random.Generator, frame: Frame) -> set[str]:
    """Adds lashes and brow. A pixel of the pupil behind a lash is still labeled pupil."""
    eye, image = frame.eye, frame.image
    style = _style(rng, eye.closed)
    canvas = np.zeros((HEIGHT, WIDTH), np.uint8)
    if rng.random() < 0.35:
        draw_strokes(canvas, eye.pose.to_frame(_brow(rng, eye)), int(between(rng, 60, 190)), 1)
        canvas = soften_canvas(canvas, between(rng, 0.5, 2.0))
    lashes = eye.pose.to_frame(_upper_lashes(rng, eye, style))
    strength = int(between(rng, 120, 250))
    fine = int(rng.integers(1, 3))
    groups = np.array_split(np.arange(len(lashes)), 3)
    for group, share in zip(groups, (1.0, 0.75, 0.5), strict=True):
        value = int(strength * share)
        draw_strokes(canvas, lashes[group], value, 1)
        near_root = lashes[group][:, : POINTS // 2 + 1]
        draw_strokes(canvas, near_root, value, 3 if style.thick else fine)
    if eye.closed or (style.thick and rng.random() < 0.6):
        t = np.linspace(-0.97, 0.97, 40)
        y = eye.lids.curves(t)[0] - 1
        liner = eye.pose.to_frame(np.stack([t * eye.lids.half_width, y], -1))[None]
        draw_strokes(canvas, liner, int(between(rng, 100, 230)), int(rng.integers(2, 6)))
    canvas = soften_canvas(canvas, between(rng, 0.4, 1.4))
    cover = canvas.astype(np.float32)
    cover *= np.float32(1 / 255)
    tone = eye.levels.pupil + between(rng, -6, 14)
    image += (np.float32(tone) - image) * cover

    _draw_lower(rng, eye, image, canvas)
    return {"mascara"} if style.thick else set()


def _draw_lower(
    rng: np.random.Generator, eye: Eye, image: Field, canvas: NDArray[np.uint8]
) -> None:
    """Adds the lashes of the lower lid, in place; the canvas is overwritten."""
    lower = eye.pose.to_frame(_lower_lashes(rng, eye))
    canvas[:] = 0
    draw_strokes(canvas, lower, int(between(rng, 60, 200)), 1)
    rows = np.flatnonzero(canvas.any(axis=1))
    if len(rows) == 0:
        return
    # Lower lashes that are lit from below can be brighter than the iris.
    shine = rng.random() < 0.3
    tone = eye.levels.sclera + between(rng, 10, 40) if shine else eye.levels.pupil + 10
    top, stop = int(rows[0]), int(rows[-1]) + 1
    band = image[top:stop]
    band += (np.float32(tone) - band) * canvas[top:stop].astype(np.float32) * np.float32(1 / 255)
