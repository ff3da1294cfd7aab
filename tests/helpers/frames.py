"""Plain frames with one dark ellipse, and videos made of frames."""

from __future__ import annotations

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH, Ellipse
from pupilseg.predict.postprocess import draw_ellipse

PUPIL = Ellipse(301.3, 188.6, 52.4, 41.7, 0.4)


def eye(ellipse=PUPIL, shape=(HEIGHT, WIDTH)):
    """Returns a bright frame with a dark ellipse with an anti-aliased border."""
    fine = 4
    grown = Ellipse(
        *((v + 0.5) * fine - 0.5 for v in ellipse[:2]),
        *(v * fine for v in ellipse[2:4]),
        ellipse[4],
    )
    mask = draw_ellipse(grown, (shape[0] * fine, shape[1] * fine))
    cover = mask.reshape(shape[0], fine, shape[1], fine).mean(axis=(1, 3))
    return np.rint(120 - 100 * cover).astype(np.uint8)


def write_video(path, frames, fps=25.0, fourcc="MJPG"):
    """Writes gray frames as a color video."""
    size = frames[0].shape[::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), fps, size)
    assert writer.isOpened()
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR))
    writer.release()
    return path
