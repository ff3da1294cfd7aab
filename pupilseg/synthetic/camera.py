"""The camera: blur of the lens, shot noise, tone curve of the driver, transmission."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.synthetic.fields import enlarge, soften
from pupilseg.synthetic.ranges import between

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pupilseg.synthetic.anatomy import Eye
    from pupilseg.synthetic.fields import Field

SHOT_NOISE = 0.10
"""Variance of the noise divided by the gray level, measured on raw frames."""
GAMMA = 0.8
CLAHE_CLIP, CLAHE_TILES = 1.5, (8, 8)
GAMMA_TABLE = (255 * np.linspace(0, 1, 256) ** GAMMA).astype(np.uint8)
"""The gray curve that RITnet's preprocessing applies before CLAHE."""
HALF = (WIDTH // 2, HEIGHT // 2)
"""Reduced size at which the halo is computed; no loss, since the halo is wider than 2 px."""
ENLARGED_SHARE = 0.08
"""Share of frames enlarged from a sensor with fewer pixels."""
COMPRESSED_SHARE = 0.12
"""Share of frames compressed as JPEG, which is similar to the compression of most video."""
SMEARED_SHARE = 1 / 30
"""Share of frames with motion blur."""
BARS_SHARE = 0.06
"""Share of frames with bars at both sides, among frames whose pupil leaves room for them."""
BAR_WIDTHS = (53, 120)
"""Px per side when a 4:3 or 1:1 frame is fitted into 640 x 400."""


def blur(rng: np.random.Generator, image: Field) -> Field:
    """Returns the image blurred by the lens, with a faint halo around bright areas.

    One frame in ten is out of focus, one in thirty has motion blur. All kernels are symmetric, so
    no edge moves.
    """
    sigma = between(rng, 1.2, 2.4) if rng.random() < 0.1 else between(rng, 0.45, 1.0)
    sharp = soften(image, sigma)
    if rng.random() < SMEARED_SHARE:
        sharp = _smear(sharp, between(rng, 3, 9), between(rng, 0, math.pi))
    small = np.asarray(cv2.resize(image, HALF, interpolation=cv2.INTER_AREA), np.float32)
    halo = enlarge(soften(small, between(rng, 0.9, 3.0)))
    share = between(rng, 0.0, 0.25)
    return np.asarray(cv2.addWeighted(sharp, 1 - share, halo, share, 0), np.float32)


def _smear(image: Field, length: float, angle: float) -> Field:
    """Returns the image with motion blur over `length` px along `angle`."""
    reach = math.ceil(length / 2)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    for step in np.linspace(-0.5, 0.5, 65) * length:
        x, y = reach + step * math.cos(angle), reach + step * math.sin(angle)
        kernel[round(y), round(x)] += 1
    return np.asarray(cv2.filter2D(image, cv2.CV_32F, kernel / kernel.sum()), np.float32)


def expose(rng: np.random.Generator, image: Field) -> NDArray[np.uint8]:
    """Returns the sensor's reading: the image with shot noise, clipped and rounded to uint8."""
    strength = SHOT_NOISE * rng.lognormal(0.03, 0.25)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    if rng.random() < 0.2:
        noise = soften(noise, 0.45) * np.float32(1.35)
    np.clip(image, 0, 400, out=image)
    noise *= np.sqrt(image * np.float32(strength))
    noise += image
    return np.asarray(cv2.convertScaleAbs(np.maximum(noise, 0, out=noise)), np.uint8)


def tone(rng: np.random.Generator, image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], str]:
    """Returns the frame as the camera's driver delivers it, mostly raw, and its trait."""
    kind = rng.random()
    if kind < 0.62:
        return image, "raw"
    if kind < 0.77:
        clahe = cv2.createCLAHE(CLAHE_CLIP, CLAHE_TILES)
        return np.asarray(clahe.apply(cv2.LUT(image, GAMMA_TABLE)), np.uint8), "clahe"
    if kind < 0.83:
        return np.asarray(cv2.equalizeHist(image), np.uint8), "equalized"
    gray = np.linspace(0, 1, 256) ** between(rng, 0.75, 1.35)
    table = gray * 255 * between(rng, 0.7, 1.6) + between(rng, -18, 15)
    return np.asarray(cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8)), np.uint8), "curve"


def transmit(
    rng: np.random.Generator, image: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], set[str]]:
    """Returns the received frame: some frames are enlarged from fewer pixels, some compressed."""
    traits = set()
    share, quality = between(rng, 0.45, 0.85), round(between(rng, 30, 92))
    if rng.random() < ENLARGED_SHARE:
        size = (round(WIDTH * share), round(HEIGHT * share))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        how = cv2.INTER_LINEAR if rng.random() < 0.5 else cv2.INTER_CUBIC
        image = np.asarray(cv2.resize(small, (WIDTH, HEIGHT), interpolation=how), np.uint8)
        traits.add("enlarged")
    if rng.random() < COMPRESSED_SHARE:
        _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        image = np.asarray(cv2.imdecode(code, cv2.IMREAD_GRAYSCALE), np.uint8)
        traits.add("compressed")
    return image, traits


def crop_to_bars(
    rng: np.random.Generator, eye: Eye, image: NDArray[np.uint8], classes: NDArray[np.uint8]
) -> set[str]:
    """Blackens both sides in place, like letterboxing a 4:3 or 1:1 frame.

    Labels under the bars become background. Frames whose pupil the bars would cut are not changed.
    """
    width = int(rng.choice(BAR_WIDTHS))
    pupil = eye.pupil
    near = min(pupil.center_x_px, WIDTH - pupil.center_x_px) - pupil.semi_axis_a_px
    if rng.random() > BARS_SHARE or near < width + 5:
        return set()
    for part in (np.s_[:, :width], np.s_[:, WIDTH - width :]):
        image[part] = 0
        classes[part] = 0
    return {"bars"}
