"""The eyeball between the lids: sclera, textured iris and pupil, and their labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.synthetic.fields import draw_strokes, periodic_noise, ramp, smooth_noise
from pupilseg.synthetic.ranges import between

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.geometry import Ellipse
    from pupilseg.synthetic.anatomy import Eye
    from pupilseg.synthetic.fields import Field

SCLERA, IRIS, PUPIL = 1, 2, 3
TEXTURE_SIZE = (48, 512)
"""Radial and angular cells of the iris texture; an angular cell is about 1 px at the limbus."""
RIM_PX = 40
"""Margin of the window above and below the opening, for the shading of the lids' edges."""
RAGGED_CELLS = 720
"""Angular steps of the pupil's edge."""


class Window(NamedTuple):
    """A rectangle of the frame, as slices."""

    rows: slice
    columns: slice

    def grid(self) -> tuple[Field, Field]:
        """Returns x (1, w) and y (h, 1) of the pixel centers, float32."""
        x = np.arange(self.columns.start, self.columns.stop, dtype=np.float32)[None, :]
        y = np.arange(self.rows.start, self.rows.stop, dtype=np.float32)[:, None]
        return x, y


class Eyeball(NamedTuple):
    """The visible part of the eyeball.

    Attributes:
        window: the part of the frame that contains the opening.
        gray: float32 (h, w), gray levels in the window under even light.
        cover: float32 (h, w), share of each pixel inside the opening, 0 to 1.
        rim: float32 (h, w), factor for the skin at the lids' edges.
        classes: uint8 (h, w) of {0, 1, 2, 3}.
    """

    window: Window
    gray: Field
    cover: Field
    rim: Field
    classes: NDArray[np.uint8]


def window_of(eye: Eye) -> Window | None:
    """Returns the smallest window that contains the opening; None if it is not in the frame."""
    columns = np.flatnonzero(eye.lower > eye.upper)
    if len(columns) == 0:
        return None
    left, right = max(int(columns[0]) - 2, 0), min(int(columns[-1]) + 3, WIDTH)
    top = max(math.floor(float(eye.upper[columns].min())) - RIM_PX, 0)
    bottom = min(math.ceil(float(eye.lower[columns].max())) + RIM_PX, HEIGHT)
    return Window(slice(top, bottom), slice(left, right)) if bottom > top else None


def _lid_distance(eye: Eye, window: Window) -> tuple[Field, Field]:
    """Returns signed distances below the upper lid and above the lower, px, float32 (h, w)."""
    _, y = window.grid()
    upper, lower = eye.upper[window.columns], eye.lower[window.columns]
    below = (y - upper) * (1 / np.hypot(1, np.gradient(upper))).astype(np.float32)
    above = (lower - y) * (1 / np.hypot(1, np.gradient(lower))).astype(np.float32)
    return below, above


def _rim(rng: np.random.Generator, eye: Eye, window: Window, below: Field, above: Field) -> Field:
    """Returns a factor that shades the skin along the lids' edges, float32 (h, w)."""
    scale = eye.pose.scale
    reach = (window.grid()[0] - np.float32(eye.pose.x_px)) / np.float32(eye.lids.half_width * scale)
    fade = np.clip(2 - 2 * np.abs(reach), 0, 1)
    wide_up, wide_low = between(rng, 3, 20) * scale, between(rng, 3, 12) * scale
    up = np.exp(np.abs(below) * np.float32(-1 / wide_up))
    low = np.exp(np.abs(above) * np.float32(-1 / wide_low))
    up *= np.float32(between(rng, -0.45, 0.12))
    low *= np.float32(between(rng, -0.3, 0.25))
    up += low
    up *= fade
    up += 1
    return up


def _edge_distance(ellipse: Ellipse, window: Window) -> tuple[Field, Field, Field]:
    """Returns the relative radius (1 on the edge) and its x and y components, float32 (h, w)."""
    x, y = window.grid()
    x, y = x - np.float32(ellipse.center_x_px), y - np.float32(ellipse.center_y_px)
    cos, sin = math.cos(ellipse.angle_rad), math.sin(ellipse.angle_rad)
    a, b = ellipse.semi_axis_a_px, ellipse.semi_axis_b_px
    along = x * np.float32(cos / a) + y * np.float32(sin / a)
    across = y * np.float32(cos / b) - x * np.float32(sin / b)
    return np.asarray(cv2.magnitude(along, across), np.float32), along, across


def _ragged_edge(rng: np.random.Generator) -> Field:
    """Returns the relative radius of the pupil's edge by angle, float32 (720 + 1,), mean 1.

    The lowest frequency is 3, because frequencies 1 and 2 would move and stretch the ellipse.
    """
    waves = np.arange(3, 40)
    rough = between(rng, 0.002, 0.012)
    size = rng.normal(0, 1, len(waves)) * (waves / 3.0) ** -between(rng, 0.5, 1.5)
    phase = rng.uniform(0, 2 * math.pi, len(waves))
    angle = np.linspace(0, 2 * math.pi, RAGGED_CELLS + 1)
    edge = (size[:, None] * np.cos(waves[:, None] * angle + phase[:, None])).sum(axis=0)
    edge = np.clip(edge / (edge.std() + 1e-6), -2.5, 2.5)
    return (1 + rough * edge).astype(np.float32)


def _iris_texture(rng: np.random.Generator) -> Field:
    """Returns the unrolled iris, float32: rows from pupil to limbus, columns around the pupil.

    Radial fibers, the ring of the collarette, crypts and broad patches, with unit deviation.
    """
    radial, around = TEXTURE_SIZE
    t = np.linspace(0, 1, radial, dtype=np.float32)[:, None]
    fibers = periodic_noise(rng, (4, 128), TEXTURE_SIZE) * between(rng, 0.1, 0.7)
    fibers += periodic_noise(rng, (6, 64), TEXTURE_SIZE) * between(rng, 0.1, 0.9)
    patches = periodic_noise(rng, (5, 16), TEXTURE_SIZE) * between(rng, 0.3, 1.2)
    crypts = periodic_noise(rng, (12, 32), TEXTURE_SIZE)
    crypts = np.minimum(crypts + 0.8, 0) * between(rng, 0.0, 1.5)
    wave = periodic_noise(rng, (1, 16), (1, around)) * np.float32(0.04)
    collarette = np.exp(-(((t - between(rng, 0.18, 0.4) - wave) / 0.09) ** 2))
    texture = fibers * (1.2 - t) + patches + crypts + collarette * between(rng, -0.3, 1.2)
    return (texture - texture.mean()) / np.float32(texture.std() + 1e-6)


def _sclera(rng: np.random.Generator, eye: Eye, window: Window) -> Field:
    """Returns the sclera with vessels and caruncle, float32 (h, w), relative to its level."""
    x, y = window.grid()
    size = (y.shape[0], x.shape[1])
    white = 1 + smooth_noise(rng, (6, 12), size) * np.float32(0.03)
    across = (x - np.float32(eye.pose.x_px)) * np.float32(
        1 / (eye.lids.half_width * eye.pose.scale)
    )
    white = white - np.float32(between(rng, 0.05, 0.5)) * across * across
    vessels = np.zeros(size, np.uint8)
    count = int(rng.integers(0, 14))
    if count:
        start = np.stack(
            [
                rng.choice([-1.0, 1.0], count) * rng.uniform(0.55, 1.0, count),
                rng.normal(0, 0.25, count),
            ],
            -1,
        ) * [eye.lids.half_width, eye.lids.upper + eye.lids.lower]
        steps = np.stack(
            [
                rng.normal(0, 3, (count, 14)) - 6 * np.sign(start[:, :1]),
                rng.normal(0, 4, (count, 14)),
            ],
            -1,
        )
        lines = eye.pose.to_frame(start[:, None] + np.cumsum(steps, axis=1))
        corner = np.array([window.columns.start, window.rows.start], np.float32)
        draw_strokes(vessels, lines - corner, 255, 1)
        white *= 1 - cv2.GaussianBlur(vessels, (0, 0), 0.9).astype(np.float32) * np.float32(
            between(rng, 0.05, 0.25) / 255
        )
    inner = eye.pose.to_frame(
        np.array([-eye.lids.half_width * 0.94, -eye.lids.tilt * eye.lids.half_width])
    )
    radius = between(rng, 10, 24) * eye.pose.scale
    near = np.exp(
        -(((x - inner[0]) / np.float32(radius)) ** 2)
        - ((y - inner[1]) / np.float32(radius * 0.6)) ** 2
    )
    return white + near * np.float32(between(rng, -0.15, 0.35))


def draw_eyeball(rng: np.random.Generator, eye: Eye) -> Eyeball | None:
    """Draws the eyeball inside the lid opening; None if the opening is not in the frame.

    Labels and gray levels come from the same signed distances. The label changes where the distance
    at the pixel's center changes sign; gray levels blend around that edge.
    """
    window = window_of(eye)
    if window is None:
        return None
    below, above = _lid_distance(eye, window)
    soft = between(rng, 1, 7), between(rng, 1, 7)
    cover = np.minimum(ramp(below, soft[0]), ramp(above, soft[1]))
    rim_shade = _rim(rng, eye, window, below, above)
    levels, scale = eye.levels, eye.pose.scale

    relative, _, _ = _edge_distance(eye.iris, window)
    iris_radius = math.sqrt(eye.iris.semi_axis_a_px * eye.iris.semi_axis_b_px)
    inside_iris = (1 - relative) * np.float32(iris_radius)
    relative, along, across = _edge_distance(eye.pupil, window)
    pupil_radius = math.sqrt(eye.pupil.semi_axis_a_px * eye.pupil.semi_axis_b_px)
    angle = cv2.phase(along, across)
    edge = _ragged_edge(rng)
    cell = np.rint(angle * np.float32(RAGGED_CELLS / (2 * math.pi))).astype(np.intp)
    inside_pupil = (edge[np.minimum(cell, RAGGED_CELLS)] - relative) * np.float32(pupil_radius)

    outside = np.maximum(-inside_pupil, 0)
    depth = outside / (outside + np.maximum(inside_iris, 0) + np.float32(1e-3))
    unrolled = cv2.remap(
        _iris_texture(rng),
        angle * np.float32(TEXTURE_SIZE[1] / (2 * math.pi)),
        depth * np.float32(TEXTURE_SIZE[0] - 1),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_WRAP,
    )
    contrast = levels.iris - levels.pupil
    # Deviation in gray levels: 6 to 19 on real frames with noise and shading, less on dark irises.
    strength = min(between(rng, 3.5, 17), 0.36 * contrast)
    limbus = between(rng, 0.05, 0.35)
    iris = levels.iris + unrolled * np.float32(strength)
    # Powers of float32 take ten times as long as products.
    square = depth * depth
    iris -= np.float32(limbus * contrast) * (square * square * depth)
    # The ruff: the rim of the pupil, mostly darker than the iris around it.
    ruff = np.exp(-outside * np.float32(1 / between(rng, 3, 7)))
    iris += np.float32(between(rng, -0.28, 0.15) * contrast) * ruff
    iris = np.maximum(iris, np.float32(levels.pupil + 3))

    gray = _sclera(rng, eye, window) * np.float32(levels.sclera)
    gray += (iris - gray) * ramp(inside_iris, between(rng, 2, 13) * scale)
    shade = np.exp(np.maximum(below, 0) * np.float32(-1 / (between(rng, 4, 14) * scale)))
    gray = gray - (gray - np.float32(levels.pupil)) * shade * np.float32(between(rng, 0.1, 0.6))
    rim = np.exp(-(((above - np.float32(2.5)) * np.float32(1 / 2.5)) ** 2))
    gray += rim * np.float32(between(rng, -6, 14))
    gray += (np.float32(levels.pupil) - gray) * ramp(inside_pupil, between(rng, 1.0, 3.2))

    classes = np.full(gray.shape, SCLERA, np.uint8)
    classes[inside_iris >= 0] = IRIS
    classes[inside_pupil >= 0] = PUPIL
    classes[(below < 0) | (above < 0)] = 0
    return Eyeball(window, gray, cover, rim_shade, classes)
