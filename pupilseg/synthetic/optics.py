"""Light and lenses: illumination, vignette and lens rings, glints, sparkles, spectacles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.synthetic.anatomy import between
from pupilseg.synthetic.fields import (
    coarse_grid,
    draw_strokes,
    enlarge,
    ramp,
    smooth_noise,
    soften_canvas,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.synthetic.anatomy import Eye
    from pupilseg.synthetic.fields import Field

RING_PERIOD_PX = 7.4
"""Distance between the concentric rings that the lens leaves on bright skin."""
BORDER_SHARE = 0.5
"""Share of frames whose lit field ends inside the frame."""
MAX_BORDER = 0.17
"""Largest part of the frame that the dark border takes."""
MAX_ON_PUPIL = 3
"""Glints that may lie on the pupil."""
FAINT_SHARE = 0.12
"""Share of glints that do not saturate."""
WET_SHARE = 0.35
"""Share of open eyes with sparkles along the lids' edges."""
SCENE_SHARE = 0.1
"""Share of open eyes in whose cornea a bright scene is seen."""
STEPS_PER_PX = 4
"""Steps a px of the radial tables of vignette and rings."""


def light_field(rng: np.random.Generator, eye: Eye) -> Field:
    """Returns how bright the light is, float32 (400, 640), 1 at the eye; brightest above it."""
    x, y = coarse_grid()
    center_x = eye.pose.x_px + between(rng, -110, 110, 1.5)
    center_y = eye.pose.y_px - between(rng, 10, 190)
    wide, high = 115 + 230 * rng.random() ** 1.4, between(rng, 170, 420)
    floor = between(rng, 0.0, 0.3)
    fall = ((x - center_x) / wide) ** 2 + ((y - center_y) / high) ** 2
    light = floor + (1 - floor) * np.exp(-fall / 2)
    light *= 1 + smooth_noise(rng, (4, 6), light.shape) * between(rng, 0.0, 0.06)
    # Nose and brow keep light from the corners, from skin and sclera alike.
    half = eye.lids.half_width
    for side in (-1, 1):
        spot = eye.pose.to_frame(np.array([side * half * between(rng, 0.9, 1.3), half * 0.05]))
        size = half * eye.pose.scale * np.array([between(rng, 0.2, 0.5), between(rng, 0.12, 0.4)])
        near = ((x - spot[0]) / size[0]) ** 2 + ((y - spot[1]) / size[1]) ** 2
        light *= 1 - between(rng, 0.0, 0.6) * np.exp(-near)
    at_eye = floor + (1 - floor) * math.exp(-(((eye.pose.y_px - center_y) / high) ** 2) / 2)
    return enlarge((light / at_eye).astype(np.float32))


def apply_lens(rng: np.random.Generator, eye: Eye, image: Field, on_eye: Field) -> set[str]:
    """Adds rings to the skin and cuts the lit field out of the dark border; returns the traits.

    Both are functions of the distance from the lens' axis, so they are read from one table a px
    of distance.

    Args:
        rng: stream of the optics.
        eye: the eye; its pupil never lies in the border.
        image: float32 (400, 640), lit scene; changed in place.
        on_eye: float32 (400, 640), share of each pixel covered by the eyeball, kept free of rings.
    """
    rings = rng.random() < 0.55
    border = rng.random() < BORDER_SHARE
    center_x = WIDTH / 2 + between(rng, -110, 110)
    center_y = HEIGHT / 2 + between(rng, -60, 60)
    radius = _distance(center_x, center_y)
    level = np.float32(eye.levels.border)
    if rings:
        steps = np.arange(0, 600 * STEPS_PER_PX, dtype=np.float32) / STEPS_PER_PX
        grow = np.clip((steps - between(rng, 0, 160)) / 150, 0.0, 1)
        wave = np.sin(steps * (2 * math.pi / RING_PERIOD_PX)) * grow
        # 0.05 of a level of 60 to 120 is an amplitude of 2 to 6.
        table = (wave * between(rng, 0.03, 0.07)).astype(np.float32)
        pattern = table[(radius * STEPS_PER_PX).astype(np.intp)]
        pattern *= 1 - on_eye
        image += (image - level) * pattern
    if border:
        inside = _lit_field(rng, eye, radius, center_x, center_y)
        dim = np.clip(inside * np.float32(1 / between(rng, 20, 160)), 0, 1)
        dim = 1 - (1 - dim) ** 2 * np.float32(between(rng, 0.0, 0.8))
        image -= level
        image *= dim * ramp(inside, between(rng, 2, 5))
        # Stray light on the mount: the border is flat, but not to the last level.
        stray = np.clip(1 + smooth_noise(rng, (3, 5), (50, 80)) * between(rng, 0.0, 0.09), 0, 1.2)
        image += enlarge(stray.astype(np.float32) * level)
    return {name for name, is_drawn in (("rings", rings), ("border", border)) if is_drawn}


def _distance(x_px: float, y_px: float) -> Field:
    """Returns each pixel's distance from a point, float32 (400, 640)."""
    x = np.arange(WIDTH, dtype=np.float32)[None, :] - np.float32(x_px)
    y = np.arange(HEIGHT, dtype=np.float32)[:, None] - np.float32(y_px)
    return np.sqrt(x * x + y * y)


def _lit_field(
    rng: np.random.Generator, eye: Eye, radius: Field, center_x: float, center_y: float
) -> Field:
    """Returns px inside the lit field, negative in the border: a disc, often cut by a second one.

    The border takes at most `MAX_BORDER` of the frame, and never comes near the pupil.
    """
    pupil = eye.pupil

    def cut(distance: Field, share: float, x: float, y: float) -> Field:
        least = math.hypot(pupil.center_x_px - x, pupil.center_y_px - y) + pupil.semi_axis_a_px + 40
        ordered = np.sort(distance[::8, ::8], axis=None)
        limit = max(float(ordered[int((1 - share) * ordered.size)]), least)
        return np.float32(limit) - distance

    share = between(rng, 0.01, MAX_BORDER)
    second = share * between(rng, 0.2, 0.8) if rng.random() < 0.5 else 0.0
    inside = cut(radius, share - second, center_x, center_y)
    if second:
        # The edge of another part of the mount: its middle far off, so that its arc is flatter.
        x, y = center_x + rng.normal(0, 220), center_y + rng.normal(0, 90)
        inside = np.minimum(inside, cut(_distance(x, y), second, x, y))
    return inside


def dark_corners(rng: np.random.Generator, eye: Eye, image: Field) -> set[str]:
    """Draws the lens barrel that shows in the lower corners of a third of the frames, in place."""
    if rng.random() > 0.35:
        return set()
    which = rng.random()
    for right in (False, True):
        # The left corner alone, the right one alone, or both.
        if which < 0.3 if right else which > 0.7:
            continue
        wide, high = round(between(rng, 15, 130)), round(between(rng, 20, 130))
        # A circle through both ends of the corner's arc, its middle on the frame's side of them.
        chord = math.hypot(wide, high)
        radius = chord * between(rng, 0.8, 4)
        away = math.sqrt(radius**2 - chord**2 / 4)
        center = (round(wide / 2 + away * high / chord), round(high / 2 - away * wide / chord))
        mask = np.zeros((high, wide), np.uint8)
        cv2.circle(mask, center, round(radius), 255, -1, cv2.LINE_AA)
        lit = cv2.blur(mask, (3, 3)).astype(np.float32) * np.float32(1 / 255)
        if right:
            lit = lit[:, ::-1]
        corner = image[HEIGHT - high :, WIDTH - wide :] if right else image[HEIGHT - high :, :wide]
        corner += (np.float32(eye.levels.border + between(rng, -8, 2)) - corner) * (1 - lit)
        if rng.random() < 0.7:
            mask[:] = 0
            inner = round(radius + between(rng, 3, 10))
            cv2.circle(mask, center, inner, 255, int(rng.integers(2, 6)), cv2.LINE_AA)
            glow = mask[:, ::-1] if right else mask
            corner += glow.astype(np.float32) * np.float32(between(rng, 8, 35) / 255)
    return {"corners"}


def add_spot(
    image: Field,
    x: float,
    y: float,
    area: float,
    *,
    stretch: float = 1.0,
    angle: float = 0.0,
    glow: float = 1.0,
) -> None:
    """Adds a light spot that saturates over about `area` px, with a soft flank, in place.

    A `glow` below 1 makes it fainter at the same size.
    """
    radius = math.sqrt(area / math.pi)
    sigma = 0.42 * radius + 0.45
    peak = glow * 210 * math.exp(min(radius * radius / (2 * sigma * sigma), 4.0))
    reach = math.ceil(radius * max(stretch, 1) + 3.5 * sigma) + 1
    left, top = max(round(x) - reach, 0), max(round(y) - reach, 0)
    patch = image[top : round(y) + reach + 1, left : round(x) + reach + 1]
    if round(y) + reach < 0 or round(x) + reach < 0 or patch.size == 0:
        return
    dx = np.arange(left, left + patch.shape[1], dtype=np.float32)[None, :] - np.float32(x)
    dy = np.arange(top, top + patch.shape[0], dtype=np.float32)[:, None] - np.float32(y)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    u, v = (dx * cos + dy * sin) * np.float32(1 / stretch), dy * cos - dx * sin
    square = u * u + v * v
    patch += np.float32(peak) * np.exp(square * np.float32(-0.5 / sigma**2))
    patch += np.float32(18 * glow) * np.exp(square * np.float32(-0.5 / (3 * sigma) ** 2))


def add_glints(rng: np.random.Generator, eye: Eye, image: Field, on_eye: Field) -> int:
    """Adds the lamps' reflections on the cornea, in place; returns how many are visible.

    Mostly 3 to 16 lamps in a ring around the optical axis, sometimes a part of the ring, and in one
    frame of twelve one or two lamps beside the camera.
    """
    iris = eye.iris
    single = rng.random() < 0.08
    count = int(rng.integers(1, 3)) if single else int(3 + 13 * rng.random() ** 1.8)
    ring = iris.semi_axis_a_px * (between(rng, 0.05, 0.3) if single else between(rng, 0.4, 0.78))
    if not single:
        ring = max(ring, eye.pupil.semi_axis_a_px * between(rng, 0.95, 1.25))
    # Reflections follow the centre of the cornea, half-way to the middle of the opening.
    center_x = eye.pupil.center_x_px * 0.75 + eye.pose.x_px * 0.25 + rng.normal(0, 4)
    center_y = eye.pupil.center_y_px + rng.normal(0, 8)
    span = 2 * math.pi if rng.random() < 0.6 else between(rng, 3.0, 5.0)
    turn = between(rng, 0, 2 * math.pi)
    area = 6 + 38 * rng.random() ** 1.6
    flat = between(rng, 0.75, 1.0)
    near = math.sqrt(eye.pupil.semi_axis_a_px * eye.pupil.semi_axis_b_px) + 2
    on_pupil = seen = 0
    for number in range(count):
        angle = turn + span * number / count + rng.normal(0, 0.08)
        away = ring * (1 + rng.normal(0, 0.06))
        x = center_x + away * math.cos(angle)
        y = center_y + away * flat * math.sin(angle)
        inside = 0 <= x < WIDTH - 1 and 0 <= y < HEIGHT - 1
        if not inside or on_eye[round(y), round(x)] < 0.5 or rng.random() < 0.06:
            continue
        on_pupil += math.hypot(x - eye.pupil.center_x_px, y - eye.pupil.center_y_px) < near
        if on_pupil > MAX_ON_PUPIL:
            continue
        own = float(np.clip(area * rng.lognormal(0, 0.35), 5, 70))
        glow = between(rng, 0.05, 0.6) if rng.random() < FAINT_SHARE else 1.0
        turned = between(rng, 0, math.pi)
        add_spot(image, x, y, own, stretch=between(rng, 1, 1.7), angle=turned, glow=glow)
        if rng.random() < 0.3:
            # A lamp of several parts, or a tear film that is not even: a second, smaller lobe.
            away = math.sqrt(own) * between(rng, 0.5, 1.6)
            x, y = x + away * math.cos(turned), y + away * math.sin(turned)
            add_spot(image, x, y, own * between(rng, 0.1, 0.4), glow=glow * between(rng, 0.2, 1))
        seen += 1
    return seen


def add_sparkles(
    rng: np.random.Generator, eye: Eye, image: Field, classes: NDArray[np.uint8]
) -> None:
    """Adds clusters of small reflections from tears, in place; nine in ten beside the iris."""
    for _ in range(0 if eye.closed else int(rng.integers(0, 4))):
        t = between(rng, -1, 1)
        up, low = (float(v) for v in eye.lids.curves(np.array(t)))
        spot = eye.pose.to_frame(
            np.array([t * eye.lids.half_width, up + (low - up) * between(rng, 0.3, 1.05)])
        )
        spread = between(rng, 2, 14)
        x, y = np.clip(np.rint(spot), 0, (WIDTH - 1, HEIGHT - 1)).astype(int)
        if classes[y, x] >= 2 and rng.random() < 0.9:
            continue
        for _ in range(int(rng.integers(1, 12))):
            at_x, at_y = spot + rng.normal(0, spread, 2) * (1, 0.6)
            add_spot(image, float(at_x), float(at_y), between(rng, 0.1, 1.0) ** 2 * 9)
    if not eye.closed and rng.random() < WET_SHARE:
        _add_wet_rim(rng, eye, image)


def _add_wet_rim(rng: np.random.Generator, eye: Eye, image: Field) -> None:
    """Adds the faint sparkles of the tear film along both lids' edges, in place."""
    for lid in (0, 1):
        count = int(rng.integers(0, 16))
        t = np.clip(between(rng, -0.5, 0.5) + rng.normal(0, 0.25, count), -0.9, 0.9)
        edge = eye.lids.curves(t)[lid] + (1 - 2 * lid) * rng.uniform(0, 4, count)
        points = eye.pose.to_frame(np.stack([t * eye.lids.half_width, edge], -1))
        for x, y in points.tolist():
            add_spot(image, x, y, between(rng, 0.5, 3), glow=between(rng, 0.05, 0.5))


def add_scene(rng: np.random.Generator, eye: Eye, image: Field, on_eye: Field) -> set[str]:
    """Adds a faint mirror image of windows or screens on the cornea, in place."""
    if rng.random() > SCENE_SHARE or eye.closed:
        return set()
    canvas = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    reach = eye.iris.semi_axis_a_px
    for _ in range(int(rng.integers(1, 4))):
        middle = (
            eye.iris.center_x_px + rng.normal(0, 0.5) * reach,
            eye.iris.center_y_px + rng.normal(0, 0.4) * reach,
        )
        size = (reach * between(rng, 0.1, 0.9), reach * between(rng, 0.1, 0.7))
        corners = cv2.boxPoints((middle, size, between(rng, -25, 25))) / 2
        corners += rng.normal(0, 0.03 * reach, corners.shape)
        shown = np.rint(corners).astype(np.int32)
        cv2.fillPoly(canvas, [shown], round(between(rng, 60, 255)), cv2.LINE_AA)
    glow = enlarge(soften_canvas(canvas, between(rng, 0.6, 4)).astype(np.float32))
    image += glow * on_eye * np.float32(between(rng, 8, 60) / 255)
    return {"scene"}


def add_spectacles(rng: np.random.Generator, eye: Eye, image: Field) -> None:
    """Adds what spectacles show: streaks, specks, ghost lamps and a dark rim, in place."""
    glow = np.zeros((HEIGHT, WIDTH), np.uint8)
    source = np.array([between(rng, 0, WIDTH), between(rng, -60, HEIGHT + 60)])
    count = int(rng.integers(3, 22))
    angle = rng.uniform(0, 2 * math.pi, count)
    start = rng.uniform(0, 60, count)
    length = rng.uniform(40, 320, count)
    ray = np.stack([np.cos(angle), np.sin(angle)], -1)
    lines = source + np.stack([start, start + length], -1)[..., None] * ray[:, None]
    # Each ray fades outwards: its far part faint, the near part bright.
    for line in lines.astype(np.float32):
        value, width = between(rng, 20, 200), int(rng.integers(1, 5))
        for share in (1.0, 0.75, 0.5, 0.25):
            near = np.stack([line[0], line[0] + share * (line[1] - line[0])])
            draw_strokes(glow, near[None], round(value * (1.15 - share)), width)
    for _ in range(int(rng.integers(0, 30))):
        spot = (int(rng.integers(0, WIDTH)), int(rng.integers(0, HEIGHT)))
        cv2.circle(glow, spot, int(rng.integers(1, 4)), int(between(rng, 60, 255)), -1, cv2.LINE_AA)
    glow = soften_canvas(glow, between(rng, 0.8, 3.0))
    image += glow.astype(np.float32) * np.float32(between(rng, 0.3, 1.1))
    for _ in range(int(rng.integers(0, 4))):
        x, y = between(rng, 0, WIDTH), between(rng, 0, HEIGHT)
        area, turn = between(rng, 4, 18) ** 2, between(rng, 0, math.pi)
        add_spot(image, x, y, area, stretch=between(rng, 1, 2), angle=turn)
    if rng.random() < 0.6:
        _add_rim(rng, eye, image)


def _add_rim(rng: np.random.Generator, eye: Eye, image: Field) -> None:
    rim: NDArray[np.uint8] = np.zeros((HEIGHT, WIDTH), np.uint8)
    axes = (round(between(rng, 300, 480)), round(between(rng, 190, 300)))
    center = (
        round(eye.pose.x_px + between(rng, -130, 130)),
        round(eye.pose.y_px + between(rng, -40, 110)),
    )
    width = round(between(rng, 8, 40))
    cv2.ellipse(rim, center, axes, between(rng, -8, 8), 0, 360, 255, width, cv2.LINE_AA)
    cover = cv2.blur(rim, (5, 5)).astype(np.float32) * np.float32(between(rng, 0.6, 1.0) / 255)
    image += (np.float32(eye.levels.border + between(rng, -5, 25)) - image) * cover
