"""Draws overlay.jpg: four rendered eyes with the outlines that `efficientvit_base` predicts.

Run: python docs/overlay.py
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from pupilseg.pictures import encode, outline_ellipse
from pupilseg.predict import Predictor
from pupilseg.synthetic import render

SEED, FRAMES = 7, (3, 9, 36, 30)
"""A series that no network was trained on: plain, spectacles, a side view, dark."""
SCALE = 0.625
"""400 x 250 px per frame."""


def tile(predictor: Predictor, index: int) -> np.ndarray:
    """Returns a frame with the outline of its predicted pupil, uint8 (250, 400, 3), BGR."""
    image = render(index, seed=SEED).image
    small = cv2.resize(image, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_AREA)
    canvas = cv2.cvtColor(small, cv2.COLOR_GRAY2BGR)
    ellipse = predictor(image).ellipse
    if ellipse is not None:
        outline_ellipse(canvas, ellipse, SCALE)
    return canvas


if __name__ == "__main__":
    predictor = Predictor("efficientvit_base")
    strip = np.hstack([tile(predictor, index) for index in FRAMES])
    Path(__file__).with_suffix(".jpg").write_bytes(encode(strip, ".jpg"))
