"""Drawing tools that all parts of the renderer share: smooth noise, ramps, strokes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Field = NDArray[np.float32]

COARSE = 8
"""Illumination and shading vary over tens of px, so they are computed every 8 px and enlarged."""
STROKE_SHIFT = 4
"""Fractional bits of stroke coordinates, a resolution of 1/16 px."""


def enlarge(field: Field, height: int = HEIGHT, width: int = WIDTH) -> Field:
    """Returns a coarse field, float32 (h, w), interpolated linearly to (height, width)."""
    return np.asarray(
        cv2.resize(field, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.float32
    )


def coarse_grid() -> tuple[Field, Field]:
    """Returns x float32 (1, 80) and y float32 (50, 1), the center of each coarse cell in px."""
    x = np.arange(WIDTH // COARSE, dtype=np.float32)[None, :]
    y = np.arange(HEIGHT // COARSE, dtype=np.float32)[:, None]
    return x * COARSE + (COARSE - 1) / 2, y * COARSE + (COARSE - 1) / 2


def smooth_noise(
    rng: np.random.Generator, cells: tuple[int, int], size: tuple[int, int] = (HEIGHT, WIDTH)
) -> Field:
    """Returns float32 noise of about unit deviation that varies over size / cells px."""
    knots = rng.standard_normal(cells, dtype=np.float32)
    return np.asarray(cv2.resize(knots, size[::-1], interpolation=cv2.INTER_CUBIC), np.float32)


def periodic_noise(
    rng: np.random.Generator, cells: tuple[int, int], size: tuple[int, int]
) -> Field:
    """Returns `smooth_noise` that is periodic along x."""
    knots = rng.standard_normal(cells, dtype=np.float32)
    pad = 2
    step = size[1] // cells[1]
    wide = np.concatenate([knots[:, -pad:], knots, knots[:, :pad]], axis=1)
    grown = cv2.resize(wide, (wide.shape[1] * step, size[0]), interpolation=cv2.INTER_CUBIC)
    inner = grown[:, pad * step : (pad + cells[1]) * step]
    if inner.shape[1] == size[1]:
        return np.ascontiguousarray(inner, dtype=np.float32)
    return enlarge(np.asarray(inner, np.float32), *size)


def soften(field: Field, sigma: float) -> Field:
    """Returns the field with a Gaussian blur of `sigma` px."""
    return np.asarray(cv2.GaussianBlur(field, (0, 0), sigma), np.float32)


def soften_canvas(canvas: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Returns a canvas of strokes with a Gaussian blur of `sigma` px."""
    return np.asarray(cv2.GaussianBlur(canvas, (0, 0), sigma), np.uint8)


def ramp(distance: Field, width: float = 1.0) -> Field:
    """Returns the coverage at a signed distance from an edge: 0 to 1 over `width` px around 0."""
    return np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)


def draw_strokes(
    canvas: NDArray[np.uint8], lines: Field, value: int, thickness: int, scale: float = 1.0
) -> None:
    """Draws anti-aliased polylines in place.

    Args:
        canvas: uint8 (h, w).
        lines: (n, points, 2), x and y in image px.
        value: gray level, 0..255.
        thickness: in canvas px.
        scale: canvas px per image px.
    """
    if len(lines) == 0:
        return
    fixed = ((lines + np.float32(0.5)) * scale - 0.5) * (1 << STROKE_SHIFT)
    points = np.rint(fixed).astype(np.int32)
    cv2.polylines(canvas, list(points), False, value, thickness, cv2.LINE_AA, STROKE_SHIFT)
