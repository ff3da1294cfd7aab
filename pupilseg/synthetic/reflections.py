"""Reflections on the eye: glints of the lamps, sparkles of tears, a mirrored scene."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.synthetic.fields import enlarge, soften_canvas
from pupilseg.synthetic.ranges import Count, Range, Skewed, between

if TYPE_CHECKING:
    from pupilseg.synthetic.anatomy import Eye
    from pupilseg.synthetic.fields import Field
    from pupilseg.synthetic.frame import Frame

# A light spot: a narrow Gaussian that saturates, on a wide faint one.
SPOT_LEVEL = 210  # gray levels that the spot adds at the edge of its saturated area
SPOT_SIGMA, SPOT_BLUR_PX = 0.42, 0.45  # sigma = 0.42 * radius + 0.45 px
SPOT_PEAK_LIMIT = 4.0  # largest exponent of the peak over the edge
SPOT_REACH = 3.5  # in units of sigma
HALO_LEVEL = 18  # gray levels
HALO_WIDTH = 3  # in units of sigma

# Glints: the lamps on the cornea, in a ring around the optical axis or beside the camera.
BESIDE_SHARE = 0.08  # of frames with one or two lamps beside the camera
BESIDE_COUNT = Count(1, 3)
BESIDE_RADIUS = Range(0.05, 0.3)  # of the iris radius
RING_COUNT = Skewed(3, 16, power=1.8)
RING_RADIUS = Range(0.4, 0.78)  # of the iris radius
RING_CLEARANCE = Range(0.95, 1.25)  # smallest radius of the ring, of the pupil radius
RING_FLATTENING = Range(0.75, 1.0)  # height / width
FULL_RING_SHARE = 0.6
RING_SPAN = Range(3.0, 5.0)  # of a partial ring, rad
GLINT_CENTER_X, GLINT_CENTER_Y = 4, 8  # standard deviation, px
GLINT_ANGLE = 0.08  # standard deviation along the ring, rad
GLINT_DISTANCE = 0.06  # standard deviation across the ring, of its radius
GLINT_AREA = Skewed(6, 44, power=1.6)  # px, mean of a frame
GLINT_AREA_SIGMA = 0.35  # of the logarithm, within a frame
GLINT_AREA_LIMITS = (5, 70)  # px
GLINT_STRETCH = Range(1, 1.7)
MISSING_SHARE = 0.06  # of glints, which are not visible
MAX_ON_PUPIL = 3
FAINT_SHARE = 0.12  # of glints, which do not saturate
FAINT_GLOW = Range(0.05, 0.6)
# A second, smaller lobe, as from a lamp with several parts or an uneven tear film.
LOBE_SHARE = 0.3
LOBE_DISTANCE = Range(0.5, 1.6)  # in units of the square root of the area
LOBE_AREA = Range(0.1, 0.4)  # of the glint's area
LOBE_GLOW = Range(0.2, 1)

# Sparkles: clusters of small reflections from tears, mostly beside the iris.
SPARKLE_CLUSTERS = Count(0, 4)
SPARKLE_X = Range(-1, 1)  # along the opening
SPARKLE_Y = Range(0.3, 1.05)  # from the upper lid to the lower
SPARKLE_SPREAD = Range(2, 14)  # standard deviation along x, px
SPARKLE_FLATTENING = 0.6
OFF_IRIS_SHARE = 0.9  # of clusters on iris and pupil, which are left out
SPARKLES = Count(1, 12)  # per cluster
SPARKLE_RADIUS = Range(0.1, 1.0)
SPARKLE_AREA = 9  # px at radius 1
# The tear film along the lids' edges.
WET_SHARE = 0.35  # of open eyes
WET_COUNT = Count(0, 16)  # per lid
WET_X = Range(-0.5, 0.5)  # center along the lid
WET_SPREAD, WET_LIMIT = 0.25, 0.9  # along the lid
WET_DISTANCE = (0, 4)  # from the edge, in eye coordinates
WET_AREA = Range(0.5, 3)  # px
WET_GLOW = Range(0.05, 0.5)

# A scene mirrored in the cornea: bright windows or screens. Units: the iris radius.
SCENE_SHARE = 0.1  # of open eyes
SCENE_COUNT = Count(1, 4)
SCENE_X, SCENE_Y = 0.5, 0.4  # standard deviation from the center of the iris
SCENE_WIDTH = Range(0.1, 0.9)
SCENE_HEIGHT = Range(0.1, 0.7)
SCENE_ANGLE = Range(-25, 25)  # degrees
SCENE_WARP = 0.03  # standard deviation of the corners
SCENE_LEVEL = Range(60, 255)  # of a window, relative to the scene's 255
SCENE_BLUR = Range(0.6, 4)  # sigma at half size, px
SCENE_STRENGTH = Range(8, 60)  # gray levels


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
    """Adds a light spot with a soft flank, in place.

    Args:
        image: float32 (H, W), gray levels.
        x: column of the center.
        y: row of the center.
        area: area of the saturated part, px.
        stretch: length / width.
        angle: direction of the longer axis, rad.
        glow: brightness; below 1 the spot is fainter at the same size.
    """
    radius = math.sqrt(area / math.pi)
    sigma = SPOT_SIGMA * radius + SPOT_BLUR_PX
    steepness = min(radius * radius / (2 * sigma * sigma), SPOT_PEAK_LIMIT)
    peak = glow * SPOT_LEVEL * math.exp(steepness)
    reach = math.ceil(radius * max(stretch, 1) + SPOT_REACH * sigma) + 1
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
    halo = np.exp(square * np.float32(-0.5 / (HALO_WIDTH * sigma) ** 2))
    patch += np.float32(HALO_LEVEL * glow) * halo


def add_glints(rng: np.random.Generator, frame: Frame) -> set[str]:
    """Adds the reflections of the lamps on the cornea; no trait.

    Most frames show 3 to 16 lamps in a ring around the optical axis, or in a part of the ring. One
    in twelve shows one or two lamps beside the camera instead.
    """
    eye, image = frame.eye, frame.image
    pupil_radius = eye.pupil.semi_axis_a_px
    beside = rng.random() < BESIDE_SHARE
    count = BESIDE_COUNT.draw(rng) if beside else int(RING_COUNT.draw(rng))
    ring = eye.iris.semi_axis_a_px * (BESIDE_RADIUS if beside else RING_RADIUS).draw(rng)
    if not beside:
        ring = max(ring, pupil_radius * RING_CLEARANCE.draw(rng))
    # Reflections follow the center of the cornea, between the pupil and the middle of the opening.
    center_x = eye.pupil.center_x_px * 0.75 + eye.pose.x_px * 0.25 + rng.normal(0, GLINT_CENTER_X)
    center_y = eye.pupil.center_y_px + rng.normal(0, GLINT_CENTER_Y)
    span = 2 * math.pi if rng.random() < FULL_RING_SHARE else RING_SPAN.draw(rng)
    turn = between(rng, 0, 2 * math.pi)
    mean_area = GLINT_AREA.draw(rng)
    flattening = RING_FLATTENING.draw(rng)
    near_pupil = math.sqrt(eye.pupil.semi_axis_a_px * eye.pupil.semi_axis_b_px) + 2
    on_pupil = 0
    for number in range(count):
        angle = turn + span * number / count + rng.normal(0, GLINT_ANGLE)
        away = ring * (1 + rng.normal(0, GLINT_DISTANCE))
        x = center_x + away * math.cos(angle)
        y = center_y + away * flattening * math.sin(angle)
        in_frame = 0 <= x < WIDTH - 1 and 0 <= y < HEIGHT - 1
        if not in_frame or frame.on_eye[round(y), round(x)] < 0.5 or rng.random() < MISSING_SHARE:
            continue
        from_pupil = math.hypot(x - eye.pupil.center_x_px, y - eye.pupil.center_y_px)
        on_pupil += from_pupil < near_pupil
        if on_pupil <= MAX_ON_PUPIL:
            area = mean_area * rng.lognormal(0, GLINT_AREA_SIGMA)
            _add_glint(rng, image, x, y, float(np.clip(area, *GLINT_AREA_LIMITS)))
    return set()


def _add_glint(rng: np.random.Generator, image: Field, x: float, y: float, area: float) -> None:
    glow = FAINT_GLOW.draw(rng) if rng.random() < FAINT_SHARE else 1.0
    angle = between(rng, 0, math.pi)
    add_spot(image, x, y, area, stretch=GLINT_STRETCH.draw(rng), angle=angle, glow=glow)
    if rng.random() < LOBE_SHARE:
        away = math.sqrt(area) * LOBE_DISTANCE.draw(rng)
        x, y = x + away * math.cos(angle), y + away * math.sin(angle)
        add_spot(image, x, y, area * LOBE_AREA.draw(rng), glow=glow * LOBE_GLOW.draw(rng))


def add_sparkles(rng: np.random.Generator, frame: Frame) -> set[str]:
    """Adds reflections from tears and from the tear film along the lids; no trait."""
    if frame.eye.closed:
        return set()
    for _ in range(SPARKLE_CLUSTERS.draw(rng)):
        _add_cluster(rng, frame)
    if rng.random() < WET_SHARE:
        _add_tear_film(rng, frame.eye, frame.image)
    return set()


def _add_cluster(rng: np.random.Generator, frame: Frame) -> None:
    eye = frame.eye
    t = SPARKLE_X.draw(rng)
    up, low = (float(v) for v in eye.lids.curves(np.array(t)))
    y = up + (low - up) * SPARKLE_Y.draw(rng)
    spot = eye.pose.to_frame(np.array([t * eye.lids.half_width, y]))
    spread = SPARKLE_SPREAD.draw(rng)
    column, row = np.clip(np.rint(spot), 0, (WIDTH - 1, HEIGHT - 1)).astype(int)
    if frame.classes[row, column] >= 2 and rng.random() < OFF_IRIS_SHARE:
        return
    for _ in range(SPARKLES.draw(rng)):
        at_x, at_y = spot + rng.normal(0, spread, 2) * (1, SPARKLE_FLATTENING)
        area = SPARKLE_RADIUS.draw(rng) ** 2 * SPARKLE_AREA
        add_spot(frame.image, float(at_x), float(at_y), area)


def _add_tear_film(rng: np.random.Generator, eye: Eye, image: Field) -> None:
    """Adds the faint sparkles of the tear film along the edges of both lids."""
    for lid, inward in ((0, 1), (1, -1)):
        count = WET_COUNT.draw(rng)
        t = WET_X.draw(rng) + rng.normal(0, WET_SPREAD, count)
        t = np.clip(t, -WET_LIMIT, WET_LIMIT)
        edge = eye.lids.curves(t)[lid] + inward * rng.uniform(*WET_DISTANCE, count)
        points = eye.pose.to_frame(np.stack([t * eye.lids.half_width, edge], -1))
        for x, y in points.tolist():
            add_spot(image, x, y, WET_AREA.draw(rng), glow=WET_GLOW.draw(rng))


def add_scene(rng: np.random.Generator, frame: Frame) -> set[str]:
    """Adds a faint mirror image of windows or screens on the cornea of some frames."""
    eye = frame.eye
    if rng.random() > SCENE_SHARE or eye.closed:
        return set()
    canvas = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    radius = eye.iris.semi_axis_a_px
    for _ in range(SCENE_COUNT.draw(rng)):
        center = (
            eye.iris.center_x_px + rng.normal(0, SCENE_X) * radius,
            eye.iris.center_y_px + rng.normal(0, SCENE_Y) * radius,
        )
        size = (radius * SCENE_WIDTH.draw(rng), radius * SCENE_HEIGHT.draw(rng))
        corners = cv2.boxPoints((center, size, SCENE_ANGLE.draw(rng))) / 2
        corners += rng.normal(0, SCENE_WARP * radius, corners.shape)
        polygon = np.rint(corners).astype(np.int32)
        cv2.fillPoly(canvas, [polygon], round(SCENE_LEVEL.draw(rng)), cv2.LINE_AA)
    glow = enlarge(soften_canvas(canvas, SCENE_BLUR.draw(rng)).astype(np.float32))
    image = frame.image
    image += glow * frame.on_eye * np.float32(SCENE_STRENGTH.draw(rng) / 255)
    return {"scene"}
