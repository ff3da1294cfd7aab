"""Spectacles: streaks around a lamp, specks, ghost lamps and a dark rim."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.synthetic.fields import draw_strokes, soften_canvas
from pupilseg.synthetic.ranges import Count, Range, between
from pupilseg.synthetic.reflections import add_spot

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.synthetic.anatomy import Eye
    from pupilseg.synthetic.fields import Field
    from pupilseg.synthetic.frame import Frame

SPECTACLES_SHARE = 1 / 7

# Streaks: rays around a point, bright near it, fainter with distance.
SOURCE_X = Range(0, WIDTH)
SOURCE_Y = Range(-60, HEIGHT + 60)
RAYS = Count(3, 22)
RAY_START = (0, 60)  # distance from the source, px
RAY_LENGTH = (40, 320)  # px
RAY_LEVEL = Range(20, 200)
RAY_WIDTH = Count(1, 5)  # px
RAY_SHARES = (1.0, 0.75, 0.5, 0.25)  # shares of the length, drawn on top of each other
FADE = 1.15  # the part with a share s of the length is drawn at (1.15 - s) of the level
# Specks of dust.
SPECKS = Count(0, 30)
SPECK_RADIUS = Count(1, 4)  # px
SPECK_LEVEL = Range(60, 255)
BLUR = Range(0.8, 3.0)  # sigma of streaks and specks, px
STRENGTH = Range(0.3, 1.1)  # of streaks and specks
# Ghost lamps: reflections on the glass.
GHOSTS = Count(0, 4)
GHOST_SIZE = Range(4, 18)  # square root of the area, px
GHOST_STRETCH = Range(1, 2)
# The rim: part of a large ellipse around the eye.
RIM_SHARE = 0.6
RIM_WIDTH = Range(300, 480)  # semi-axis, px
RIM_HEIGHT = Range(190, 300)  # semi-axis, px
RIM_X = Range(-130, 130)  # px from the eye
RIM_Y = Range(-40, 110)  # px from the eye
RIM_THICKNESS = Range(8, 40)  # px
RIM_ANGLE = Range(-8, 8)  # degrees
RIM_OPACITY = Range(0.6, 1.0)
RIM_LEVEL = Range(-5, 25)  # gray levels above the border


def add_spectacles(rng: np.random.Generator, frame: Frame) -> set[str]:
    """Adds streaks, specks, ghost lamps and a dark rim to some frames."""
    if rng.random() >= SPECTACLES_SHARE:
        return set()
    image = frame.image
    glow = np.zeros((HEIGHT, WIDTH), np.uint8)
    _draw_streaks(rng, glow)
    for _ in range(SPECKS.draw(rng)):
        spot = (int(rng.integers(0, WIDTH)), int(rng.integers(0, HEIGHT)))
        radius, level = SPECK_RADIUS.draw(rng), int(SPECK_LEVEL.draw(rng))
        cv2.circle(glow, spot, radius, level, -1, cv2.LINE_AA)
    glow = soften_canvas(glow, BLUR.draw(rng))
    image += glow.astype(np.float32) * np.float32(STRENGTH.draw(rng))
    for _ in range(GHOSTS.draw(rng)):
        x, y = between(rng, 0, WIDTH), between(rng, 0, HEIGHT)
        area, angle = GHOST_SIZE.draw(rng) ** 2, between(rng, 0, math.pi)
        add_spot(image, x, y, area, stretch=GHOST_STRETCH.draw(rng), angle=angle)
    if rng.random() < RIM_SHARE:
        _add_rim(rng, frame.eye, image)
    return {"spectacles"}


def _draw_streaks(rng: np.random.Generator, glow: NDArray[np.uint8]) -> None:
    source = np.array([SOURCE_X.draw(rng), SOURCE_Y.draw(rng)])
    count = RAYS.draw(rng)
    angle = rng.uniform(0, 2 * math.pi, count)
    start = rng.uniform(*RAY_START, count)
    length = rng.uniform(*RAY_LENGTH, count)
    ray = np.stack([np.cos(angle), np.sin(angle)], -1)
    lines = source + np.stack([start, start + length], -1)[..., None] * ray[:, None]
    for line in lines.astype(np.float32):
        level, width = RAY_LEVEL.draw(rng), RAY_WIDTH.draw(rng)
        for share in RAY_SHARES:
            near = np.stack([line[0], line[0] + share * (line[1] - line[0])])
            draw_strokes(glow, near[None], round(level * (FADE - share)), width)


def _add_rim(rng: np.random.Generator, eye: Eye, image: Field) -> None:
    """Adds the dark rim of the spectacles, an elliptical ring around the eye."""
    rim: NDArray[np.uint8] = np.zeros((HEIGHT, WIDTH), np.uint8)
    axes = (round(RIM_WIDTH.draw(rng)), round(RIM_HEIGHT.draw(rng)))
    center = (round(eye.pose.x_px + RIM_X.draw(rng)), round(eye.pose.y_px + RIM_Y.draw(rng)))
    width = round(RIM_THICKNESS.draw(rng))
    cv2.ellipse(rim, center, axes, RIM_ANGLE.draw(rng), 0, 360, 255, width, cv2.LINE_AA)
    cover = cv2.blur(rim, (5, 5)).astype(np.float32) * np.float32(RIM_OPACITY.draw(rng) / 255)
    image += (np.float32(eye.levels.border + RIM_LEVEL.draw(rng)) - image) * cover
