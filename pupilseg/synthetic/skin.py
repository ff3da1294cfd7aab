"""Skin around the eye: lid volumes, folds, wrinkles, pores, marks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.synthetic.fields import coarse_grid, draw_strokes, enlarge, smooth_noise
from pupilseg.synthetic.ranges import between

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.synthetic.anatomy import Eye
    from pupilseg.synthetic.fields import Field

HALF = (HEIGHT // 2, WIDTH // 2)
"""Folds and pores are drawn at half size: nothing on the skin is sharper than 2 px."""
PIECE = 3
"""Points of a fold drawn with one depth; one call per point would take 1.5 ms per frame."""


def _volumes(rng: np.random.Generator, eye: Eye) -> Field:
    """Returns the shading of lids and sockets on the coarse grid, (50, 80), 1 for flat skin."""
    x, y = coarse_grid()
    scale = eye.pose.scale
    columns = np.clip(x[0].astype(np.intp), 0, WIDTH - 1)
    over = (eye.upper[columns] - y) / np.float32(scale)
    under = (y - eye.lower[columns]) / np.float32(scale)
    reach = np.abs(x - np.float32(eye.pose.x_px)) / np.float32(eye.lids.half_width * scale)
    near = 1 / (1 + (reach * np.float32(0.8)) ** 4)
    over, under = np.maximum(over, 0), np.maximum(under, 0)
    shade = 1 + smooth_noise(rng, (5, 8), over.shape) * np.float32(between(rng, 0.02, 0.08))
    shade -= between(rng, -0.05, 0.35) * near * np.exp(-over / np.float32(between(rng, 8, 25)))
    bulge = (over - between(rng, 25, 50)) / between(rng, 15, 30)
    shade += between(rng, -0.1, 0.25) * near * np.exp(-bulge * bulge)
    shade -= between(rng, -0.25, 0.15) * near * np.exp(-under / np.float32(between(rng, 8, 25)))
    bag = (under - between(rng, 30, 70)) / between(rng, 12, 30)
    shade -= between(rng, -0.05, 0.18) * near * np.exp(-bag * bag)
    # The corners lie deeper in the socket than the lids.
    corner = np.exp(-(((reach - 1.15) / 0.3) ** 2) - ((over + under) / 40) ** 2)
    shade -= between(rng, 0.0, 0.4) * corner
    return shade.astype(np.float32)


def _crease(canvas: NDArray[np.uint8], line: Field, depth: float, thickness: int) -> None:
    """Draws a fold at half size, darker than 128 by up to `depth`, fading at both ends."""
    last = len(line) - 1
    for start in range(0, last, PIECE):
        stop = min(start + PIECE, last)
        fade = min(1.0, 1.6 * (1 - abs((start + stop) / last - 1)))
        value = 128 - round(depth * fade)
        draw_strokes(canvas, line[None, start : stop + 1], value, thickness, 0.5)


def _folds(rng: np.random.Generator, eye: Eye) -> NDArray[np.uint8]:
    """Returns creases and wrinkles as dark strokes on 128 at half size."""
    canvas = np.full(HALF, 128, np.uint8)
    half = eye.lids.half_width
    lids = eye.lids
    for number in range(int(rng.integers(1, 5))):
        t = np.linspace(-between(rng, 0.6, 1.4), between(rng, 0.7, 1.5), 24)
        height = max(lids.upper, 0) * between(rng, 0.9, 1.2) + between(rng, 14, 45) + 15 * number
        arch = 1 - np.abs(t + rng.normal(0, 0.1)) ** between(rng, 1.8, 2.6) * between(rng, 0.3, 0.8)
        y = lids.tilt * t * half - height * arch
        line = eye.pose.to_frame(np.stack([t * half, y], -1))
        main = number == 0 and rng.random() < 0.75
        depth = between(rng, 12, 55) if main else between(rng, 3, 18)
        _crease(canvas, line, depth, int(rng.integers(1, 6 if main else 4)))
    below = int(rng.integers(0, 7))
    for _ in range(below):
        start = between(rng, -1.1, 0.5)
        s = start + np.linspace(0, between(rng, 0.4, 1.0), 20)
        along_lid = eye.lids.curves(np.clip(s, -1, 1), between(rng, 0.7, 1.3))[1]
        low = along_lid + between(rng, 12, 75) + (s - start) * between(rng, -15, 25)
        line = eye.pose.to_frame(np.stack([s * half, low], -1))
        _crease(canvas, line, between(rng, 3, 22), int(rng.integers(1, 4)))
    feet = int(rng.integers(0, 6))
    if feet:
        s = np.linspace(0, 1, 10)[None, :]
        angle = rng.uniform(-0.7, 0.7, (feet, 1))
        x = half * (1.05 + rng.uniform(0, 0.15, (feet, 1))) + s * 90 * np.cos(angle)
        y = eye.lids.tilt * half + 40 * angle + s * 90 * np.sin(angle)
        draw_strokes(
            canvas, eye.pose.to_frame(np.stack([x, y], -1)), int(between(rng, 104, 122)), 1, 0.5
        )
    for _ in range(int(rng.integers(0, 4))):
        spot = (int(rng.integers(0, HALF[1])), int(rng.integers(0, HALF[0])))
        cv2.circle(
            canvas, spot, int(rng.integers(1, 5)), int(between(rng, 80, 120)), -1, cv2.LINE_AA
        )
    return canvas


def draw_skin(rng: np.random.Generator, eye: Eye) -> Field:
    """Returns the skin's gray levels under even light, float32 (400, 640)."""
    folds = cv2.GaussianBlur(_folds(rng, eye), (0, 0), between(rng, 0.9, 2.6))
    detail = folds.astype(np.float32)
    detail *= np.float32(1 / 128)
    coarse, fine = between(rng, 0.003, 0.02), between(rng, 0.0, 0.014)
    detail += smooth_noise(rng, (50, 80), HALF) * np.float32(coarse)
    detail += rng.standard_normal(HALF, dtype=np.float32) * np.float32(fine)
    skin = enlarge(_volumes(rng, eye))
    skin *= enlarge(detail)
    skin *= np.float32(eye.levels.skin)
    return skin
