"""Light and lens: illumination, rings, the dark border around the lit field, dark corners."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.synthetic.fields import coarse_grid, enlarge, ramp, smooth_noise
from pupilseg.synthetic.ranges import Count, Range, Skewed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.synthetic.anatomy import Eye
    from pupilseg.synthetic.fields import Field
    from pupilseg.synthetic.frame import Frame

# Illumination: a Gaussian above the eye.
LIGHT_X = Range(-110, 110, peak=1.5)  # px to the right of the eye
LIGHT_Y = Range(10, 190)  # px above the eye
LIGHT_WIDTH = Skewed(115, 345, power=1.4)  # standard deviation along x, px
LIGHT_HEIGHT = Range(170, 420)  # standard deviation along y, px
LIGHT_FLOOR = Range(0.0, 0.3)  # light far from the center, as a share of the maximum
LIGHT_NOISE = Range(0.0, 0.06)  # standard deviation
# The shade of nose and brow at both corners of the eye. Units: half-widths of the eye.
SHADE_X = Range(0.9, 1.3)
SHADE_Y = 0.05
SHADE_WIDTH = Range(0.2, 0.5)
SHADE_HEIGHT = Range(0.12, 0.4)
SHADE_DEPTH = Range(0.0, 0.6)  # share of the light taken in its middle

# The lens' axis, px from the middle of the frame.
AXIS_X = Range(-110, 110)
AXIS_Y = Range(-60, 60)
TABLE_PX = 600
"""Length of the radial table of rings, px."""
STEPS_PER_PX = 4
"""Resolution of the radial table."""

# Concentric rings that the lens leaves on bright skin.
RINGS_SHARE = 0.55
RING_PERIOD_PX = 7.4
RING_START = Range(0, 160)  # radius at which they begin, px
RING_RISE_PX = 150
RING_AMPLITUDE = Range(0.03, 0.07)  # of the gray level: 2 to 6 at levels of 60 to 120

# The dark border around the lit field.
BORDER_SHARE = 0.5
BORDER_AREA = Range(0.01, 0.17)  # share of the frame
BORDER_CUT_SHARE = 0.5  # of borders with a second arc
BORDER_CUT_AREA = Range(0.2, 0.8)  # share of the border's area beyond the second arc
BORDER_CUT_X, BORDER_CUT_Y = 220, 90  # standard deviation of the second arc's center, px
BORDER_CLEARANCE_PX = 40  # from the pupil's edge
BORDER_FALLOFF = Range(20, 160)  # width of the dim zone inside, px
BORDER_DIMMING = Range(0.0, 0.8)  # share of light lost at the edge
BORDER_EDGE = Range(2, 5)  # width of the edge, px
BORDER_NOISE = Range(0.0, 0.09)  # standard deviation of the stray light, of its level
BORDER_MOST = 1.2  # of its level

# The lens barrel in the lower corners.
CORNERS_SHARE = 0.35
ONE_CORNER_SHARE = 0.3  # of the left one alone, and of the right one alone
CORNER_WIDTH = Range(15, 130)  # px
CORNER_HEIGHT = Range(20, 130)  # px
CORNER_RADIUS = Range(0.8, 4)  # in units of the arc's chord
CORNER_LEVEL = Range(-8, 2)  # gray levels above the border
GLEAM_SHARE = 0.7  # of corners with a bright line along the arc
GLEAM_OFFSET = Range(3, 10)  # px outside the arc
GLEAM_WIDTH = Count(2, 6)  # px
GLEAM_LEVEL = Range(8, 35)  # gray levels


def light_field(rng: np.random.Generator, eye: Eye) -> Field:
    """Returns the brightness of the light, float32 (400, 640), 1 at the eye, highest above it."""
    x, y = coarse_grid()
    center_x = eye.pose.x_px + LIGHT_X.draw(rng)
    center_y = eye.pose.y_px - LIGHT_Y.draw(rng)
    width, height = LIGHT_WIDTH.draw(rng), LIGHT_HEIGHT.draw(rng)
    floor = LIGHT_FLOOR.draw(rng)
    falloff = ((x - center_x) / width) ** 2 + ((y - center_y) / height) ** 2
    light = floor + (1 - floor) * np.exp(-falloff / 2)
    light *= 1 + smooth_noise(rng, (4, 6), light.shape) * LIGHT_NOISE.draw(rng)
    half = eye.lids.half_width
    for side in (-1, 1):
        spot = eye.pose.to_frame(np.array([side * half * SHADE_X.draw(rng), half * SHADE_Y]))
        size = half * eye.pose.scale * np.array([SHADE_WIDTH.draw(rng), SHADE_HEIGHT.draw(rng)])
        near = ((x - spot[0]) / size[0]) ** 2 + ((y - spot[1]) / size[1]) ** 2
        light *= 1 - SHADE_DEPTH.draw(rng) * np.exp(-near)
    at_eye = floor + (1 - floor) * math.exp(-(((eye.pose.y_px - center_y) / height) ** 2) / 2)
    return enlarge((light / at_eye).astype(np.float32))


def add_lens(rng: np.random.Generator, frame: Frame) -> set[str]:
    """Adds rings to the skin, and the border around the lit field.

    Both depend on the distance from the lens' axis only. The border never comes near the pupil.
    """
    rings = rng.random() < RINGS_SHARE
    border = rng.random() < BORDER_SHARE
    center = (WIDTH / 2 + AXIS_X.draw(rng), HEIGHT / 2 + AXIS_Y.draw(rng))
    radius = _distance(*center)
    if rings:
        _add_rings(rng, frame, radius)
    if border:
        _add_border(rng, frame, radius, center)
    return {name for name, is_drawn in (("rings", rings), ("border", border)) if is_drawn}


def _add_rings(rng: np.random.Generator, frame: Frame, radius: Field) -> None:
    steps = np.arange(0, TABLE_PX * STEPS_PER_PX, dtype=np.float32) / STEPS_PER_PX
    rise = np.clip((steps - RING_START.draw(rng)) / RING_RISE_PX, 0.0, 1)
    wave = np.sin(steps * (2 * math.pi / RING_PERIOD_PX)) * rise
    table = (wave * RING_AMPLITUDE.draw(rng)).astype(np.float32)
    pattern = table[(radius * STEPS_PER_PX).astype(np.intp)]
    pattern *= 1 - frame.on_eye
    image = frame.image
    image += (image - np.float32(frame.eye.levels.border)) * pattern


def _add_border(
    rng: np.random.Generator, frame: Frame, radius: Field, center: tuple[float, float]
) -> None:
    level = np.float32(frame.eye.levels.border)
    inside = _lit_field(rng, frame.eye, radius, center)
    dim = np.clip(inside * np.float32(1 / BORDER_FALLOFF.draw(rng)), 0, 1)
    dim = 1 - (1 - dim) ** 2 * np.float32(BORDER_DIMMING.draw(rng))
    image = frame.image
    image -= level
    image *= dim * ramp(inside, BORDER_EDGE.draw(rng))
    # Stray light on the mount: the border is nearly, but not perfectly flat.
    stray = 1 + smooth_noise(rng, (3, 5), (50, 80)) * BORDER_NOISE.draw(rng)
    stray = np.clip(stray, 0, BORDER_MOST)
    image += enlarge(stray.astype(np.float32) * level)


def _distance(x_px: float, y_px: float) -> Field:
    """Returns each pixel's distance from a point, float32 (400, 640)."""
    x = np.arange(WIDTH, dtype=np.float32)[None, :] - np.float32(x_px)
    y = np.arange(HEIGHT, dtype=np.float32)[:, None] - np.float32(y_px)
    return np.sqrt(x * x + y * y)


def _lit_field(
    rng: np.random.Generator, eye: Eye, radius: Field, center: tuple[float, float]
) -> Field:
    """Returns the distance inside the lit field, px, negative in the border.

    The field is a disc, often cut by a second one.
    """

    def inside_disc(distance: Field, share: float, x: float, y: float) -> Field:
        """Returns the distance inside a disc around (x, y), px; a share of the frame is outside."""
        pupil = eye.pupil
        to_pupil = math.hypot(pupil.center_x_px - x, pupil.center_y_px - y)
        least = to_pupil + pupil.semi_axis_a_px + BORDER_CLEARANCE_PX
        ordered = np.sort(distance[::8, ::8], axis=None)
        limit = max(float(ordered[int((1 - share) * ordered.size)]), least)
        return np.float32(limit) - distance

    share = BORDER_AREA.draw(rng)
    second = share * BORDER_CUT_AREA.draw(rng) if rng.random() < BORDER_CUT_SHARE else 0.0
    inside = inside_disc(radius, share - second, *center)
    if second:
        # The second disc is another part of the mount. Its center is far away, so its arc is
        # flatter.
        x = center[0] + rng.normal(0, BORDER_CUT_X)
        y = center[1] + rng.normal(0, BORDER_CUT_Y)
        inside = np.minimum(inside, inside_disc(_distance(x, y), second, x, y))
    return inside


def add_corners(rng: np.random.Generator, frame: Frame) -> set[str]:
    """Adds the lens barrel that shows in one or both lower corners of some frames."""
    if rng.random() > CORNERS_SHARE:
        return set()
    which = rng.random()
    if which <= 1 - ONE_CORNER_SHARE:
        _add_corner(rng, frame.eye, frame.image)
    if which >= ONE_CORNER_SHARE:
        _add_corner(rng, frame.eye, frame.image[:, ::-1])
    return {"corners"}


def _add_corner(rng: np.random.Generator, eye: Eye, image: Field) -> None:
    """Draws the barrel in the lower left corner of the image, or of its mirrored view."""
    width, height = round(CORNER_WIDTH.draw(rng)), round(CORNER_HEIGHT.draw(rng))
    # The circle passes through both ends of the corner's arc; its center is on the frame's side.
    chord = math.hypot(width, height)
    radius = chord * CORNER_RADIUS.draw(rng)
    away = math.sqrt(radius**2 - chord**2 / 4)
    center = (round(width / 2 + away * height / chord), round(height / 2 - away * width / chord))
    mask: NDArray[np.uint8] = np.zeros((height, width), np.uint8)
    cv2.circle(mask, center, round(radius), 255, -1, cv2.LINE_AA)
    lit = cv2.blur(mask, (3, 3)).astype(np.float32) * np.float32(1 / 255)
    corner = image[HEIGHT - height :, :width]
    level = np.float32(eye.levels.border + CORNER_LEVEL.draw(rng))
    corner += (level - corner) * (1 - lit)
    if rng.random() < GLEAM_SHARE:
        mask[:] = 0
        outer = round(radius + GLEAM_OFFSET.draw(rng))
        cv2.circle(mask, center, outer, 255, GLEAM_WIDTH.draw(rng), cv2.LINE_AA)
        corner += mask.astype(np.float32) * np.float32(GLEAM_LEVEL.draw(rng) / 255)
