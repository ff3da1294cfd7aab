"""Draws a sample: the input of a network and its training targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH, Ellipse
from pupilseg.pictures import GREEN, caption, outline_ellipse, sheet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_ZERO_LINE = (255, 255, 255)
_CONTOUR_STEP = 0.1


def sample_picture(sample: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Returns image, label, weights and both distance maps of a sample, side by side.

    Args:
        sample: as `ShardSet.sample` returns it.

    Returns:
        uint8 (1200, 1280, 3), BGR. The parts, each 400 x 640: the image; the image with label and
        ellipse; the weights (0 black, largest white); the distance to the background and to the
        pupil (blue inside the class, red outside, white at 0, with contour lines every 0.1
        diagonals); a legend.
    """
    image = _gray(sample["image"])
    weights = sample["spatial_weights"]
    largest = float(weights.max())
    scaled = (weights * (255 / largest) if largest > 0 else weights).astype(np.uint8)
    background, pupil = sample["dist_map"]
    parts = {
        "image": image,
        "label, ellipse": _labeled(image, sample),
        f"spatial_weights: 0 to {largest:g}": _gray(scaled),
        f"dist_map 0, background: {_span(background)}": _signed(background),
        f"dist_map 1, pupil: {_span(pupil)}": _signed(pupil),
        str(sample["name"]): _legend(sample),
    }
    for text, part in parts.items():
        caption(part, text)
    return sheet(list(parts.values()), (WIDTH, HEIGHT))


def _gray(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(plane, cv2.COLOR_GRAY2BGR), dtype=np.uint8)


def _labeled(image: NDArray[np.uint8], sample: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Returns the image with a tinted label and the free ellipse."""
    out = image.copy()
    inside = sample["label"] != 0
    out[inside] = (out[inside] * 0.5 + np.array(GREEN) * 0.5).astype(np.uint8)
    if sample["ellipse_free"][2] > 0:
        outline_ellipse(out, Ellipse(*(float(value) for value in sample["ellipse_free"])), 1.0)
    return out


def _span(plane: NDArray[np.float32]) -> str:
    return f"{plane.min():.3f} to {plane.max():.3f}"


def _signed(plane: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Returns a signed map in colors: blue below zero, red above, with contour lines."""
    strength = np.clip(np.abs(plane) * 255, 0, 255)
    out = np.zeros((*plane.shape, 3), np.uint8)
    out[..., 2] = np.where(plane > 0, 64 + strength * 0.75, 0)
    out[..., 0] = np.where(plane < 0, 64 + strength * 0.75, 0)
    level = np.floor(plane / _CONTOUR_STEP)
    edge = np.zeros(plane.shape, np.bool_)
    edge[:, 1:] |= level[:, 1:] != level[:, :-1]
    edge[1:] |= level[1:] != level[:-1]
    out[edge] //= 2
    out[plane == 0] = _ZERO_LINE
    return out


def _legend(sample: Mapping[str, Any]) -> NDArray[np.uint8]:
    out = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    x, y, a, b, angle = (float(value) for value in sample["ellipse_free"])
    pixels = int(np.count_nonzero(sample["label"]))
    lines = [f"pupil {pixels} px ({pixels / sample['label'].size:.2%})"]
    if a > 0:
        lines.append(f"ellipse center {x:.1f}, {y:.1f} px; semi-axes {a:.1f}, {b:.1f} px")
        lines.append(f"angle {np.degrees(angle):.1f} degrees")
    lines.append("vector " + ", ".join(f"{float(value):.4f}" for value in sample["ellipse"]))
    for row, line in enumerate(lines):
        caption(out, line, row + 1)
    return out
