"""The camera: blur of the lens, shot noise, and the tone curve of its driver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.synthetic.anatomy import between
from pupilseg.synthetic.fields import soften

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.synthetic.fields import Field

SHOT_NOISE = 0.10
"""Variance of the noise over the grey level, measured on raw frames."""
GAMMA = 0.8
CLAHE_CLIP, CLAHE_TILES = 1.5, (8, 8)
GAMMA_TABLE = (255 * np.linspace(0, 1, 256) ** GAMMA).astype(np.uint8)
"""The grey curve that RITnet's preprocessing applies before CLAHE."""


def blur(rng: np.random.Generator, image: Field) -> Field:
    """Returns the image as a lens focuses it: slight blur, one frame in ten out of focus."""
    sigma = between(rng, 1.2, 2.4) if rng.random() < 0.1 else between(rng, 0.45, 1.0)
    return soften(image, sigma)


def expose(rng: np.random.Generator, image: Field) -> NDArray[np.uint8]:
    """Returns what the sensor reads: shot noise added, clipped and rounded to uint8."""
    strength = SHOT_NOISE * rng.lognormal(0, 0.25)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    if rng.random() < 0.3:
        noise = soften(noise, 0.45) * np.float32(1.35)
    np.clip(image, 0, 400, out=image)
    noise *= np.sqrt(image * np.float32(strength))
    noise += image
    return np.asarray(cv2.convertScaleAbs(np.maximum(noise, 0, out=noise)), np.uint8)


def tone(rng: np.random.Generator, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the frame as a driver hands it out: mostly raw, else stretched or equalised."""
    kind = rng.random()
    if kind < 0.62:
        return image
    if kind < 0.77:
        clahe = cv2.createCLAHE(CLAHE_CLIP, CLAHE_TILES)
        return np.asarray(clahe.apply(cv2.LUT(image, GAMMA_TABLE)), np.uint8)
    if kind < 0.83:
        return np.asarray(cv2.equalizeHist(image), np.uint8)
    grey = np.linspace(0, 1, 256) ** between(rng, 0.75, 1.35)
    table = grey * 255 * between(rng, 0.7, 1.6) + between(rng, -18, 15)
    return np.asarray(cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8)), np.uint8)
