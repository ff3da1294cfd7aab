"""The renderer of near-infrared eyes: images with exact labels, made from two integers.

Frame i of seed s is the same bytes in every process and in any order (on one machine; another
processor's vector units may round a pixel differently). No file is read, and nothing of any
recorded eye is in it beyond the ranges its parameters are drawn from.

    eye -> skin, eyeball (labels) -> light -> hair -> lens -> blur -> reflections -> noise -> tone
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pupilseg.geometry import HEIGHT, WIDTH, Ellipse
from pupilseg.synthetic.anatomy import Eye, sample_eye
from pupilseg.synthetic.camera import blur, crop_to_bars, expose, tone, transmit
from pupilseg.synthetic.eyeball import draw_eyeball
from pupilseg.synthetic.hair import draw_hair
from pupilseg.synthetic.optics import (
    add_glints,
    add_scene,
    add_sparkles,
    add_spectacles,
    apply_lens,
    dark_corners,
    light_field,
)
from pupilseg.synthetic.skin import draw_skin

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RENDERER_VERSION", "Rendered", "eye_of", "render"]

RENDERER_VERSION = 3
"""Raised by every change that alters a rendered byte. Manifests of rendered data record it, so that
shards made by another version are known to be stale and frames are only compared within one."""
SPECTACLES_SHARE = 1 / 7


class Rendered(NamedTuple):
    """One rendered frame.

    Attributes:
        image: uint8 (400, 640).
        classes: uint8 (400, 640) of {0 background, 1 sclera, 2 iris, 3 pupil}: pixels whose centre
            lies inside the structure's drawn edge and inside the lid opening. Reflections and
            lashes in front of a structure do not change its class.
        pupil: the full pupil in px, also where a lid hides it; None for a closed eye. The drawn
            edge is ragged around it.
        iris: the full iris in px; None for a closed eye.
        traits: what chance put into the frame, sorted: the camera's treatment ("raw", "clahe",
            "equalised" or "curve") and any of "closed", "spectacles", "border", "rings",
            "corners", "mascara", "scene", "enlarged", "compressed", "bars".
    """

    image: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    pupil: Ellipse | None
    iris: Ellipse | None
    traits: tuple[str, ...]


def render(index: int, seed: int = 0) -> Rendered:
    """Renders a frame.

    Each part draws from a random stream of its own, so that changing how one part is drawn leaves
    the others of every frame as they were.

    Args:
        index: number of the frame, >= 0; every index is another eye.
        seed: number of the series, >= 0.

    Raises:
        ValueError: index or seed is negative.
    """
    anatomy, flesh, eyeball, hair, optics, camera = _streams(index, seed)
    eye = sample_eye(anatomy)
    traits = {"closed"} if eye.closed else set()
    image = draw_skin(flesh, eye)
    classes = np.zeros((HEIGHT, WIDTH), np.uint8)
    on_eye = np.zeros((HEIGHT, WIDTH), np.float32)
    ball = draw_eyeball(eyeball, eye)
    if ball is not None:
        part = image[ball.window]
        part *= ball.rim
        part += (ball.grey - part) * ball.cover
        classes[ball.window] = ball.classes
        on_eye[ball.window] = ball.cover
    haze = np.float32(eye.levels.pupil)
    image -= haze
    image *= light_field(optics, eye)
    image += haze
    traits |= draw_hair(hair, eye, image)
    traits |= apply_lens(optics, eye, image, on_eye)
    traits |= dark_corners(optics, eye, image)
    image = blur(camera, image)
    add_glints(optics, eye, image, on_eye)
    add_sparkles(optics, eye, image, classes)
    traits |= add_scene(optics, eye, image, on_eye)
    if optics.random() < SPECTACLES_SHARE:
        add_spectacles(optics, eye, image)
        traits.add("spectacles")
    frame, treatment = tone(camera, expose(camera, image))
    traits.add(treatment)
    frame, arrived = transmit(camera, frame)
    traits |= arrived | crop_to_bars(camera, eye, frame, classes)
    pupil, iris = (None, None) if eye.closed else (eye.pupil, eye.iris)
    return Rendered(frame, classes, pupil, iris, tuple(sorted(traits)))


def eye_of(index: int, seed: int = 0) -> Eye:
    """Returns what frame `index` of series `seed` shows: pose, lids and grey levels, undrawn.

    Raises:
        ValueError: index or seed is negative.
    """
    return sample_eye(_streams(index, seed)[0])


def _streams(index: int, seed: int) -> list[np.random.Generator]:
    """Returns the random streams of a frame's parts: eye, skin, eyeball, hair, optics, camera."""
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must be >= 0, got index={index}, seed={seed}")
    return np.random.default_rng([seed, index]).spawn(6)
